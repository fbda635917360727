"""The published trainings of ARREST. ``recipes.json`` has every number and its source.

"FAT" is a re-implementation by readers of the paper (sgmath12/FAT). Its statements about the paper are second-hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...models.classifiers import build_classifier
from ..publication import Recipe, read_recipes
from .config import ArrestConfig
from .task import ArrestTask


@dataclass(frozen=True)
class ArrestRecipe(Recipe):
    """A published ARREST training.

    With ``official_code``, the training is that of the re-implementation: the random start of PGD is normal with
    standard deviation 0.001, the drift is measured in training mode, and the representation is pooled.
    """

    settings = ArrestConfig

    def build_classifier(self, width: int | None = None) -> nn.Module:
        """Build the network with fresh weights, to be trained on clean images first. None means the recipe's width."""
        options: dict[str, Any] = self.part("classifier") | ({} if width is None else {"width": width})
        name = options.pop("name")
        shape, classes = self.image_shape, self["data.num_classes"]
        # the sources do not say how images are normalized, so these are the statistics of the data set
        mean = self.own.get("data.mean", (0.4914, 0.4822, 0.4465))
        std = self.own.get("data.std", (0.2470, 0.2435, 0.2616))
        return build_classifier(name, shape, classes, mean=mean, std=std, **options)

    def task(
        self, classifier: nn.Module, official_code: bool = False, layers: Sequence[str] | None = None
    ) -> ArrestTask:
        """Return the finetuning of a ``classifier`` trained on clean images, which is changed in place, for `fit`."""
        return ArrestTask(classifier, self.config(official_code), self.image_shape, layers)


RECIPES = read_recipes(ArrestRecipe, "arrest")
