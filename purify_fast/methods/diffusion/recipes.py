"""The published purifications by diffusion, number by number, each with its source, in ``recipes.json``.

A source is a file and its lines in one of the repositories NVlabs/DiffPure at commit 985703f, JinyiW/GuidedDiffusionPur
at 6ee8b1a, ml-postech/robust-evaluation-of-diffusion-based-purification at 3b98b01 or
ethz-spylab/diffusion_denoised_smoothing at 699e7a5. Nothing of them is copied here. The denoisers were trained by
others: these recipes have no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..base import Recipe, read_recipes
from .defence import DiffusionPurifier
from .process import Process
from .schedule import Schedule


@dataclass(frozen=True)
class DiffusionRecipe(Recipe):
    """A published purification. The keys ``schedule.`` and ``process.`` are fields of `Schedule` and `Process`."""

    def process(self) -> Process:
        """The recipe's process; a noise given as sigma becomes the t* with this noise."""
        schedule, fields = Schedule(**self.part("schedule")), self.part("process")
        if "noise.sigma" in self.facts:
            fields["t_star"] = schedule.time_of(self["noise.sigma"])
        return Process(schedule=schedule, **fields)

    def defence(self, denoiser: nn.Module, classifier: nn.Module, **changes: Any) -> DiffusionPurifier:
        """The defence.

        Args:
            denoiser: takes images of the recipe's size in [-1, 1].
            classifier: takes images of the recipe's size; trained on clean images by the authors.
            changes: arguments of `DiffusionPurifier` that replace those of the recipe.
        """
        options = {"image_shape": self.image_shape, "process": self.process(), **self.part("defence"), **changes}
        return DiffusionPurifier(denoiser, classifier, **options)


RECIPES = read_recipes(DiffusionRecipe, Path(__file__).with_name("recipes.json"))
