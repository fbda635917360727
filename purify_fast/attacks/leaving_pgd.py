"""PGD that leaves images alone once they have fallen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .._validation import Count
from ..speed.graphs.step_loop import State, eager_steps
from .context import Ball, keeping
from .objective import Objective
from .pgd import PGD

if TYPE_CHECKING:
    from .health import GradientHealth


@dataclass(frozen=True, kw_only=True)
class LeavingPGD(PGD):
    """PGD that takes no further steps for an image once all draws of one step have misclassified the image.

    The draws of a step are fresh, so twenty wrong draws are twenty independent wrong predictions.

    Args:
        look_every: the number of steps between two checks for misclassified images.
    """

    code_version: ClassVar[str] = "4, leaving 1"

    look_every: Count = 20

    def __post_init__(self) -> None:
        if not self.keep_best:
            raise ValueError("keep_best must be True, because LeavingPGD returns the best points, got False")
        super().__post_init__()

    def climb(
        self,
        objective: Objective,
        ball: Ball,
        state: State,
        health: GradientHealth | None,
        *,
        steps: int,
        first: int = 0,
        end: int | None = None,
    ) -> State:
        begin = whole = state
        # For each tensor, the dimension that has an entry per image. A tensor without dimensions belongs to all images.
        dims = {name: int(name == "best_score") for name, value in begin.items() if value.dim()}
        index = torch.arange(len(begin["y"]), device=begin["y"].device)
        with keeping(lambda: whole["best"]):
            for first in range(0, steps, self.look_every):
                end = min(steps, first + self.look_every)
                with eager_steps():
                    # The compiler would compile the step again for each number of images.
                    state = super().climb(objective, ball.take(index), state, health, steps=steps, first=first, end=end)
                # Drop the values that `PGD.climb` has added, such as the radii. The next call adds them again.
                state = {name: state[name] for name in begin}
                whole = state | {name: whole[name].index_copy(dim, index, state[name]) for name, dim in dims.items()}
                stay = (state["best_score"][0] < 1).nonzero()[:, 0]
                if health is not None:
                    # `Search.result` counts a gradient for every image and step. Subtract the remaining gradients of
                    # the images that are removed here.
                    health.add(gradients=(len(stay) - len(index)) * (steps - end))
                if not len(stay):
                    break
                index = index[stay]
                state |= {name: state[name].index_select(dim, stay) for name, dim in dims.items()}
        return whole
