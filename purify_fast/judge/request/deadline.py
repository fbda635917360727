"""The time at which an evaluation ends. Every forward pass of its searches and probes asks for this time."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ...attacks.context import TimeIsOver
from ...protocols import Classifier, Passes

#: No passes. Who asks for them only asks whether the time is over.
NONE = Passes()


class Deadline:
    """Ends work at a time of `time.monotonic`, before a pass that would probably end later.

    Attributes:
        until: the time at which the present work ends; infinite for work without an end, such as a judgement.
        over: whether the present work was ended. From then on it gets no further pass.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device
        # The seconds that the last passes of each size took.
        self._seconds = dict[Passes, float]()
        self.begin()

    def begin(self, until: float = math.inf) -> None:
        """Begin work that ends at a time."""
        self.until, self.over = until, False
        self._last: tuple[float, Passes] | None = None

    def watch(self, model: Classifier) -> Classifier:
        """A model that asks for the time before each pass of the given one."""

        def watched(x: Tensor) -> Tensor:
            self.ask(Passes(len(x), len(x) * x.requires_grad))
            return model(x)

        return watched

    def ask(self, images: Passes = NONE) -> None:
        """Raise `TimeIsOver` if the time is over, or would be over after passes that take as long as the last such."""
        # An evaluation without a limit of time needs none of what makes graphs.
        from ...speed.graphs.step_graphs import is_tracing

        if self.until == math.inf or is_tracing():
            # The end of a trial or a capture by an error would be taken as its failure.
            return
        if self.device is not None and self.device.type == "cuda":
            # Otherwise hours of work could be launched in advance.
            torch.cuda.synchronize(self.device)
        now = time.monotonic()
        if self._last is not None:
            self._seconds[self._last[1]] = now - self._last[0]
        self._last = now, images
        self.over = self.over or now + self._seconds.get(images, 0.0) >= self.until
        if self.over:
            raise TimeIsOver
