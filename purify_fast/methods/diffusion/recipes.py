"""The published purifications by diffusion. ``recipes.yaml`` has every value and its source.

A source is a file and its lines in NVlabs/DiffPure at commit 985703f, JinyiW/GuidedDiffusionPur at 6ee8b1a,
ml-postech/robust-evaluation-of-diffusion-based-purification at 3b98b01 or ethz-spylab/diffusion_denoised_smoothing at
699e7a5. The authors did not train the denoisers themselves, so these recipes have no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..recipes import Recipe, read_recipes
from .defence import DiffusionPurifier
from .process import Process, Schedule


@dataclass(frozen=True)
class DiffusionRecipe(Recipe):
    """A published purification. Values with ``schedule.`` and ``process.`` are fields of `Schedule` and `Process`."""

    def process(self) -> Process:
        """Return the recipe's process. If the recipe states the noise as sigma, t* is the time with this noise."""
        schedule, fields = Schedule(**self.part("schedule")), self.part("process")
        if "noise.sigma" in self.values:
            fields["t_star"] = schedule.time_of(self["noise.sigma"])
        return Process(schedule=schedule, **fields)

    def defence(self, denoiser: nn.Module, classifier: nn.Module, **changes: Any) -> DiffusionPurifier:
        """Build the defence with a denoiser for images in [-1, 1]. ``changes`` replace the recipe's arguments."""
        options = {"image_shape": self.image_shape, "process": self.process(), **self.part("defence"), **changes}
        return DiffusionPurifier(denoiser, classifier, **options)


RECIPES = read_recipes(DiffusionRecipe, "diffusion")
