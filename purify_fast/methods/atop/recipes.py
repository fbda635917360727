"""The published trainings of AToP, number by number, each with its source, in ``recipes.json``.

The paper's sections on the method could not be read first-hand, so that nearly everything is from the released
notebooks (glin2022/atop, commit 9fa1e91). Lines are counted over the code cells of a notebook; "train.yaml" is
``configs/train.yaml`` of the same repository. The repository has no licence: nothing of it is copied here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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

    With ``official_code`` it is that of the notebooks: the classifier is given purified images in [-1, 1] in the
    cross-entropy, and the gradient of the GAN term is cut off.
    """

    settings = AtopConfig

    def defence(
        self, classifier: nn.Module, purifier: nn.Module | None = None, official_code: bool = False, **changes: Any
    ) -> Atop:
        """The defence that is trained.

        Args:
            classifier: takes images of the recipe's size; trained on clean images by the authors.
            purifier: the purifier to train, with its weights; None for a `DeepFillGenerator` with fresh weights, in the
                authors' size. They begin with a generator that was trained on Places2.
            official_code: one mask for all images of a batch.
            changes: arguments of `Atop` that take the place of the recipe's.
        """
        purifier = DeepFillGenerator() if purifier is None else purifier
        options = {"image_shape": self.image_shape, **self.part("defence", official_code), **changes}
        return Atop(classifier, purifier, **options)

    def task(self, defence: Atop, official_code: bool = False) -> AtopTask:
        """The training of a defence, for `purify_fast.training.fit`.

        Args:
            defence: the defence to train.
            official_code: repeat the authors' code, as for `config`.
        """
        return AtopTask(defence, self.config(official_code))


RECIPES = read_recipes(AtopRecipe, Path(__file__).with_name("recipes.json"))
