"""Replace CUDA graphs on a CPU, where a GPU's measurements are rehearsed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch


class Replays:
    """Replaces CUDA graphs in `StepGraphs` on a CPU. A replay runs the step again."""

    kind = "cpu"

    def aside(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Return an empty context, because nothing disturbs the capture on a CPU."""
        return contextlib.nullcontext()

    def clock(self) -> float:
        """Return a constant, because times do not matter here."""
        return 0.0

    def timed(self, run: Callable[[], None], device: torch.device) -> tuple[float, float]:
        """Run a step, and return constants for the launch time and the time of the whole step."""
        run()
        return 1.0, 1.0

    def now(self, device: torch.device) -> float:
        """Return a constant, because times do not matter here."""
        return 0.0

    def release(self) -> None:
        """Do nothing, because a CPU needs no memory for graphs."""

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Return the function itself, which runs the step again."""
        return run
