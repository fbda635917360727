"""How a step is tried before it is captured, and a captured one checked against the step itself."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.dispatch.registry import forced_backends
from ..precision import float32_settings

#: The error that is allowed, relative to the largest value, and the share of the values that may err by more.
ROUNDING, OTHER_SIGNS = 1e-3, 0.05


def numerics(device: torch.device) -> tuple[Any, ...]:
    """The settings of the process that decide what an operator computes on a device; they can be hashed."""
    older, newer = float32_settings()
    return (
        older,
        tuple(newer),
        forced_backends(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )


@contextlib.contextmanager
def no_trace(device: torch.device) -> Iterator[None]:
    """Within the block a step is tried and captured: no generator has moved after it, and no autocast keeps a weight.

    Autocast keeps the copies of weights that it made, until its outermost block ends. A graph would read those copies,
    which do not follow the weights.
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


def same_draws_again(device: torch.device) -> Callable[[], None]:
    """A function that puts torch's generators, that of the device among them, back where they are now."""
    host = torch.get_rng_state()
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again() -> None:
        torch.set_rng_state(host)
        if own is not None:
            torch.cuda.set_rng_state(own, device)

    return again


def host_generators(device: torch.device) -> tuple[Any, ...]:
    """The states of the generators that no graph follows; it follows the device's own."""
    array: Any = np.random.get_state()
    # on a CPU torch's generator of the host is that of the device
    host = None if device.type == "cpu" else torch.get_rng_state().numpy().tobytes()
    return random.getstate(), host, (array[0], array[1].tobytes(), *array[2:])


def first_replay_agrees(
    step: Callable[[], Mapping[str, Tensor]],
    buffers: Mapping[str, Tensor],
    replay: Callable[[], None],
    device: torch.device,
) -> bool:
    """Whether a replay gives what the step gives, from the same state and the same generator; waits for the device.

    Args:
        step: computes new values of some of the buffers, and writes to none.
        buffers: the state, by name; holds what the replay gave afterwards.
        replay: launches the captured step.
        device: where the buffers are.
    """
    again = same_draws_again(device)
    # what is a buffer itself is overwritten by the replay
    wanted = {name: value.clone() for name, value in step().items()}
    again()
    replay()
    return all(alike(buffers[name], value) for name, value in wanted.items() if value.is_floating_point())


def alike(got: Tensor, wanted: Tensor) -> bool:
    """Whether two results of a step are the same, but for sums that a library adds in another order; waits.

    Where a gradient is nearly 0 another order gives another sign, and the step goes the other way.
    """
    if not wanted.numel():
        return True
    finite = torch.where(wanted.isfinite(), wanted, 0.0)
    close = (got - wanted).abs() <= ROUNDING * finite.abs().amax()
    same = (got == wanted) | (got.isnan() & wanted.isnan()) | close
    return bool(same.float().mean() >= 1 - OTHER_SIGNS)
