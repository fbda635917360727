"""The published trainings of ARREST. ``recipes.yaml`` has every value and its source.

"FAT" is a re-implementation by readers of the paper (sgmath12/FAT). Its statements about the paper are second-hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..recipes import Recipe, read_recipes
from .method import ArrestConfig
from .task import ArrestTask


@dataclass(frozen=True)
class ArrestRecipe(Recipe):
    """A published ARREST training.

    With ``official_code``, the training is that of the re-implementation: the random start of PGD is normal with
    standard deviation 0.001, the drift is measured in training mode, and the representation is pooled.
    """

    settings = ArrestConfig
    in_proportion = ("method.learning_rate",)

    def task(
        self, classifier: nn.Module, official_code: bool = False, layers: Sequence[str] | None = None
    ) -> ArrestTask:
        """Return the finetuning of a ``classifier`` trained on clean images, which is changed in place, for `fit`."""
        return ArrestTask(classifier, self.config(official_code), self.image_shape, layers)


RECIPES = read_recipes(ArrestRecipe, "arrest")
