"""The published trainings of AToP. ``recipes.yaml`` has every value and its source.

Nearly all facts are from the released notebooks (glin2022/atop, commit 9fa1e91), not from the paper. A line number
counts the lines of all code cells. The repository has no license, so none of its code is copied here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..recipes import Recipe, read_recipes
from .defence import Atop
from .generators import DeepFillGenerator
from .method import AtopConfig
from .task import AtopTask


@dataclass(frozen=True)
class AtopRecipe(Recipe):
    """A published AToP training.

    With ``official_code``, the training is that of the notebooks: for the cross-entropy, the classifier gets purified
    images in [-1, 1], and the gradient of the GAN term is cut off.
    """

    settings = AtopConfig

    def defence(
        self, classifier: nn.Module, purifier: nn.Module | None = None, official_code: bool = False, **changes: Any
    ) -> Atop:
        """Build the defence to train. For images of another size, the side of a block is `Atop`'s default.

        Args:
            classifier: classifier for images of the recipe's size. The authors' classifier was trained on clean images.
            purifier: the purifier to train. None means a fresh `DeepFillGenerator` of the authors' size. The authors
                begin with a generator that was trained on Places2.
            official_code: use one mask for all images of a batch, as in the authors' code.
            changes: arguments of `Atop` that replace those of the recipe.
        """
        purifier = DeepFillGenerator(self.image_shape[0] + 2) if purifier is None else purifier
        options = {"image_shape": self.image_shape, **self.part("defence", official_code)}
        # 32 pixels of 256, the published side, is the default for images of 256 x 256
        del options["block"]
        return Atop(classifier, purifier, **{**options, **changes})

    def task(self, defence: Atop, official_code: bool = False) -> AtopTask:
        """Return the training of a defence, for `purify_fast.training.fit`. ``official_code`` is as in `config`."""
        return AtopTask(defence, self.config(official_code))


RECIPES = read_recipes(AtopRecipe, "atop")
