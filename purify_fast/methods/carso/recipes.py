"""The published systems of CARSO. ``recipes.yaml`` has every value and its source.

A source that is only a file and a line is in emaballarin/CARSO, commit 307b873 (mnist_v1: 8dadfc8, 5f65f97). "ebtorch"
is its library emaballarin/ebtorch, commit e9f8d99.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ...models.classifiers import WideResNet
from ...models.foreign import load_state, read_weights
from ..publication import Recipe, read_recipes
from .config import CarsoConfig, atom_size
from .defence import Carso
from .networks import PUBLISHED, published_decoder
from .official import load_official
from .task import CarsoTask


@dataclass(frozen=True)
class CarsoRecipe(Recipe):
    """A published CARSO system."""

    settings = CarsoConfig
    # The authors' code computes the rate from the batch.
    in_proportion = ("method.learning_rate",)

    def config(self, official_code: bool = False) -> CarsoConfig:
        """Return the settings. ``official_code`` scales eps, and trains TinyImageNet without adversarial examples."""
        config: CarsoConfig = super().config(official_code)
        if not official_code:
            return config
        local = self["loop.batch_size"] // self["run.processes"]
        fraction = 4 * atom_size(local, config.adversarial_fraction, allow_none=True) / local
        return replace(config, adversarial_fraction=fraction, allow_no_adversarial=fraction == 0)

    def defence(self, classifier: nn.Module, **changes: Any) -> Carso:
        """Build the defence with a fresh purifier. If no decoder was published for the images, it is `decoder_plan`'s.

        Args:
            classifier: a trained network. If it is not a `WideResNet`, name its ``layers``.
            changes: arguments of `Carso` that replace those of the recipe.
        """
        data = {"image_shape": self.image_shape, "mean": self["data.mean"], "std": self["data.std"]}
        options = {**self.part("defence"), **data, **changes}
        if isinstance(classifier, WideResNet) and options["layers"] == self["defence.layers"]:
            # The paper takes the same layers of every block, and this network may have fewer blocks.
            options["layers"] = classifier.representation_layers()
        shape = tuple(options["image_shape"])
        if options["version"] == "v4" and shape in PUBLISHED:
            options.setdefault("decoder", published_decoder(shape))
        return Carso(classifier, **options)

    def load(self, directory: str | Path, classifier_weights: str | Path) -> Carso:
        """Load the system with its authors' weights, in evaluation mode.

        Args:
            directory: folder with the three safetensors files of the purifier.
            classifier_weights: file of the classifier's weights.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: no weights were published, or the files are those of another system; the message says what
                differs.
        """
        if self["defence.version"] != "v4":
            published = ", ".join(name for name, recipe in RECIPES.items() if recipe["defence.version"] == "v4")
            raise ValueError(f"recipe must be one of {published}, whose weights were published, got {self.name!r}")
        classifier = self.build_classifier()
        what = f"{classifier_weights} does not hold the classifier of this system"
        load_state(classifier, read_weights(classifier_weights), what, only_model=True)
        return load_official(classifier, directory, samples=self["defence.samples"])

    def task(self, defence: Carso, official_code: bool = False) -> CarsoTask:
        """Return the training of a defence, for `purify_fast.training.fit`. ``official_code`` is as in `config`."""
        return CarsoTask(defence, self.config(official_code))


RECIPES = read_recipes(CarsoRecipe, "carso")
