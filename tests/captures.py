"""Stand-ins for CUDA graphs on a CPU."""

import contextlib
from collections.abc import Callable

import torch


class Rerun:
    """Stands for CUDA graphs on a CPU: a replay runs the captured function again, on its buffers.

    ``error`` is raised in place of a capture, if given.
    """

    kind = "cpu"

    def __init__(self) -> None:
        self.recorded, self.replayed, self.released, self.replaying = 0, 0, 0, False
        self.error: Exception | None = None

    def aside(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def release(self) -> None:
        self.released += 1

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        if self.error is not None:
            raise self.error
        self.recorded += 1
        # the first replay of each checks it
        self.replayed -= 1

        def replay() -> None:
            self.replayed += 1
            self.replaying = True
            run()
            self.replaying = False

        return replay


class Launched(Rerun):
    """Captures, and replays nothing: what is still counted then is what the host launches beside a graph."""

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        # but for the first time, which checks it
        once = iter([run])
        return lambda: next(once, lambda: None)()
