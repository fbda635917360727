"""The published trainings of AToP. ``recipes.json`` has every number and its source.

The paper's sections on the method could not be read first-hand. So nearly all facts are from the released notebooks
(glin2022/atop, commit 9fa1e91). A line number of a notebook counts the lines of all its code cells. "train.yaml" is
``configs/train.yaml`` of the same repository. The repository has no license, so none of its code is copied here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base import Recipe, read_recipes
from .config import AtopConfig
from .defence import Atop
from .generators import DeepFillGenerator
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
        """Build the defence to train.

        Args:
            classifier: classifier for images of the recipe's size. The authors' classifier was trained on clean images.
            purifier: the purifier to train, with its initial weights. None means a `DeepFillGenerator` of the authors'
                size with fresh weights. The authors begin with a generator that was trained on Places2.
            official_code: use one mask for all images of a batch, as in the authors' code.
            changes: arguments of `Atop` that replace those of the recipe.
        """
        purifier = DeepFillGenerator() if purifier is None else purifier
        options = {"image_shape": self.image_shape, **self.part("defence", official_code), **changes}
        return Atop(classifier, purifier, **options)

    def task(self, defence: Atop, official_code: bool = False) -> AtopTask:
        """Return the training of a defence, for `purify_fast.training.fit`.

        Args:
            defence: the defence to train.
            official_code: reproduce the authors' code, as in `config`.
        """
        return AtopTask(defence, self.config(official_code))


RECIPES = read_recipes(AtopRecipe, "atop")
