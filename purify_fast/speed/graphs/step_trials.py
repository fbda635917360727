"""Try a step before it is captured, and compare a replay with the step.

A step that waits for the device cannot be part of a CUDA graph. `HostSyncs` finds the operators for which the host
waits, on any device. A tensor that is made from Python numbers also counts, because on a GPU the numbers are copied to
the device, and the host waits for this copy.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..._compiler import EagerDispatchMode
from ..memory import same_draws_again

PACKAGE = Path(__file__).resolve().parents[2]
#: Operators whose result the host reads, and operators whose data decide how many elements the result has.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "unique_dim", "_unique2"}
#: Operators that copy from one tensor to another. They wait if the two tensors are on different devices.
COPIES = {"_to_copy", "copy_"}

#: Tolerances for the comparison of a replay with its step. ROUNDING: the allowed error, as a share of the largest
#: value. OTHER_SIGNS: the share of values that may have a larger error.
ROUNDING, OTHER_SIGNS = 1e-3, 0.05


@contextlib.contextmanager
def no_trace(device: torch.device) -> Iterator[None]:
    """A block for trials and captures of a step. It restores all random generators, and disables autocast's cache.

    Autocast caches converted copies of weights until its outermost block ends. A graph would read these copies, which
    are not updated when the weights change.
    """
    python, array = random.getstate(), np.random.get_state()
    cached = torch.is_autocast_cache_enabled()
    devices = [device] if device.type == "cuda" else []
    try:
        torch.set_autocast_cache_enabled(False)
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        random.setstate(python)
        np.random.set_state(array)


def refusal_of(run: Callable[[], Any], device: torch.device, name: str) -> tuple[Any, str | None]:
    """Run a step, and return its result and the reason why it cannot be captured; None if there is no reason."""
    before = host_generators(device)
    with HostSyncs() as waits:
        result = run()
    if host_generators(device) != before:
        return result, f"{name} draws random numbers on the host, which every replay would repeat"
    # `lift_fresh`, as in torch.tensor(1.0), waits only if the tensor is on the device. It is not refused here,
    # because in this case the capture fails anyway.
    blocking = [wait for wait in waits.counts if wait.operator != "lift_fresh"]
    if not blocking:
        return result, None
    operator, file, function = blocking[0]
    return (
        result,
        f"the step waits for the device in operator {operator}, called by {function or 'a function'} ({file})",
    )


def host_generators(device: torch.device) -> tuple[Any, ...]:
    """The states of the random generators on the host. A graph advances only the generator of the device."""
    array: Any = np.random.get_state()
    # On a CPU, torch's generator of the host is the generator of the device, so it is left out.
    host = None if device.type == "cpu" else torch.get_rng_state().numpy().tobytes()
    return random.getstate(), host, (array[0], array[1].tobytes(), *array[2:])


def device_generator(device: torch.device) -> bytes:
    """The state of torch's generator of the device. On a GPU this waits for the device."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state.numpy().tobytes()


def first_replay_agrees(
    step: Callable[[], Mapping[str, Tensor]], buffers: Mapping[str, Tensor], replay: Callable[[], None]
) -> bool:
    """Tell whether a replay has the same results as the step, from the same state and with the same random draws.

    This function waits for the device.

    Args:
        step: function that returns new values of some of the buffers, and does not write to the buffers.
        buffers: the buffers of the state, by name. They contain the results of the replay afterwards.
        replay: function that launches the captured step.
    """
    again = same_draws_again(next(iter(buffers.values())).device)
    # Clone the results, because a result may be a buffer itself, which the replay overwrites.
    wanted = {name: value.clone() for name, value in step().items()}
    again()
    replay()
    return all(alike(buffers[name], value) for name, value in wanted.items() if value.is_floating_point())


def alike(got: Tensor, wanted: Tensor) -> bool:
    """Tell whether two results of a step are equal, up to rounding errors. This function waits for the device.

    A library may add numbers in another order. If a gradient is nearly 0, its sign may then differ, and the step goes
    in the other direction. So a small share of the values may have a large error.
    """
    if not wanted.numel():
        return True
    finite = torch.where(wanted.isfinite(), wanted, 0.0)
    close = (got - wanted).abs() <= ROUNDING * finite.abs().amax()
    same = (got == wanted) | (got.isnan() & wanted.isnan()) | close
    return bool(same.float().mean() >= 1 - OTHER_SIGNS)


class Wait(NamedTuple):
    """An operator that waits, and the function of this package that calls it."""

    operator: str
    #: The file of the innermost function of this package in the call stack, relative to the folder of the package.
    file: str
    function: str


class HostSyncs(EagerDispatchMode):
    """Counts all operators in a block, and separately those for which the host waits for the device.

    Attributes:
        counts: number of waits for each operator and place in the code.
        dispatched: number of all operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Wait] = Counter()
        self.dispatched = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.dispatched += 1
        name = function._schema.name.removeprefix("aten::")
        result = function(*args, **(kwargs or {}))
        if name in WAITING or _masks(name, args) or _crosses(name, args, result):
            self.counts[Wait(name, *_place())] += 1
        return result


def _masks(name: str, args: Any) -> bool:
    """Tell whether a tensor is indexed by a mask. The host must then know the number of chosen elements."""
    if name not in ("index", "index_put_", "_index_put_impl_"):
        return False
    return any(isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1]))


def _crosses(name: str, args: Any, result: Any) -> bool:
    """Tell whether a tensor is copied between devices."""
    if name not in COPIES:
        return False
    source = args[1] if name == "copy_" else args[0]
    return isinstance(source, Tensor) and source.device.type != result.device.type


def _place() -> tuple[str, str]:
    """The file and the name of the innermost function of this package in the call stack."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere", ""
