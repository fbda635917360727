"""Stand-ins for CUDA graphs on a CPU, which refuse what CUDA refuses while a graph is captured."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from host_syncs import HostSyncs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

#: Functions that raise an error, or end the capture, while CUDA captures a graph. None of them is an operator. On a CPU
#: the generator of the host is that of the device, and so is its memory. `torch.random.fork_rng` calls two of these.
REFUSED = {
    "torch": ("get_rng_state", "set_rng_state"),
    "torch.random": ("get_rng_state", "set_rng_state"),
    "torch.cuda": ("get_rng_state", "set_rng_state", "synchronize", "mem_get_info", "empty_cache"),
    "purify_fast.speed.memory": ("available_memory",),
    "torch.Tensor": ("numpy", "__array__", "tolist", "cpu", "pin_memory"),
}


class RefusedInCapture(RuntimeError):
    """CUDA would end the capture here."""


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RefusedInCapture(f"{name} is not permitted while a stream is capturing")

    return refuse


class _Pinned(TorchDispatchMode):
    """Refuses to allocate pinned memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (kwargs or {}).get("pin_memory"):
            _refused("the allocation of pinned memory")()
        return function(*args, **(kwargs or {}))


def _first_compile(callback: Any) -> Any:
    """Stand for what PyTorch asks at each call of a compiled function; refuse a function that was never compiled."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    function = sys._getframe(1).f_locals.get("fn")
    if not callable(callback) or function is None:
        # A function that is excluded from compiled graphs.
        return callback
    owner = getattr(function, "__self__", None)
    code = (owner.forward if isinstance(owner, torch.nn.Module) else function).__code__
    if not _debug_get_cache_entry_list(code):
        _refused(f"the first compilation of {code.co_name}")()
    # The operators are looked at, so the function runs as it was written.
    return None


@contextlib.contextmanager
def capturing() -> Iterator[HostSyncs]:
    """Refuse within the block what CUDA refuses in a capture. Operators that wait are counted, and raise at the end."""
    with contextlib.ExitStack() as stack:
        for where, names in REFUSED.items():
            for name in names:
                stack.enter_context(mock.patch(f"{where}.{name}", _refused(f"{where}.{name}")))
        waits = stack.enter_context(HostSyncs())
        stack.enter_context(_Pinned())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(mock.patch("torch._dynamo.eval_frame._callback_from_stance", _first_compile))
        yield waits
    # on a CPU a tensor that is made from numbers is not copied to another device
    if blocking := [name for name in waits.counts if name != "lift_fresh"]:
        raise RuntimeError(f"the step waits for the device in operator {blocking[0]}")


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
        with capturing():
            run()
        self.recorded += 1
        # the first replay of each checks it
        self.replayed -= 1

        def replay() -> None:
            self.replayed += 1
            self.replaying = True
            run()
            self.replaying = False

        return replay


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # A graph has addresses: a later ``tensor.data = other`` changes none of them.
        self.calls.append((function, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, out))))
        return out


class Tape(Rerun):
    """Stands for CUDA graphs on a CPU: a replay runs the recorded operators on the same memory, and no Python code."""

    def record(self, run, device):
        if self.error is not None:
            raise self.error
        # The operators are those that the other modes let through.
        with capturing(), _Log() as log:
            run()
        self.recorded += 1
        self.replayed -= 1

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
