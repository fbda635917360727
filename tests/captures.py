"""Stand-ins for CUDA graphs on a CPU."""

import contextlib
from collections.abc import Callable

import torch
from host_syncs import HostSyncs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
        with HostSyncs() as waits:
            run()
        # on a CPU a tensor that is made from numbers is not copied to another device
        if blocking := [wait.operator for wait in waits.counts if wait.operator != "lift_fresh"]:
            raise RuntimeError(f"the step waits for the device in operator {blocking[0]}")
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


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out


class Tape(Rerun):
    """Stands for CUDA graphs on a CPU: a replay runs the recorded operators on the same memory, and no Python code."""

    def record(self, run, device):
        if self.error is not None:
            raise self.error
        self.recorded += 1
        self.replayed -= 1
        with _Log() as log:
            run()

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for function, args, kwargs, out in log.calls:
                    given = {_memory(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
                    new = function(*args, **kwargs)
                    for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                        if isinstance(old, torch.Tensor) and old.numel() and _memory(old) not in given:
                            old.detach().copy_(value)

        return replay


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
