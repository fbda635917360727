"""The published trainings of ARREST, number by number, each with its source, in ``recipes.json``.

ARREST has no official code. "FAT" is a re-implementation by readers of the paper (sgmath12/FAT): ``methods.py``,
``main.py`` and ``arrest_20ep.yaml``. Their statements about the paper are second-hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...models.classifiers import build_classifier
from ..base import Recipe, read_recipes
from .config import ArrestConfig
from .task import ArrestTask


@dataclass(frozen=True)
class ArrestRecipe(Recipe):
    """A published ARREST training.

    With ``official_code`` it is that of the re-implementation: PGD starts from 0.001 times a normal draw, the drift is
    looked at in training mode, and the representation is pooled.
    """

    settings = ArrestConfig

    def build_classifier(self, width: int | None = None) -> nn.Module:
        """The recipe's network with fresh weights; ARREST begins with one that was trained on clean images.

        Args:
            width: width of the network in place of the recipe's, as in `purify_fast.models.build_classifier`.
        """
        options: dict[str, Any] = self.part("classifier") | ({} if width is None else {"width": width})
        name = options.pop("name")
        shape, classes = self.image_shape, self["data.num_classes"]
        # the sources do not say how images are normalized: the data set's statistics
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        return build_classifier(name, shape, classes, mean=mean, std=std, **options)

    def task(self, classifier: nn.Module, official_code: bool = False) -> ArrestTask:
        """The finetuning of a classifier in place, for `purify_fast.training.fit`.

        Args:
            classifier: trained on clean images.
            official_code: repeat the authors' code, as for `config`.
        """
        return ArrestTask(classifier, self.config(official_code), self.image_shape)


RECIPES = read_recipes(ArrestRecipe, Path(__file__).with_name("recipes.json"))
