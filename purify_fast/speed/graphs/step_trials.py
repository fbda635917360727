"""Try a step before it is captured, and compare a replay with the step."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..memory import same_draws_again

Result = TypeVar("Result")

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


def tried(run: Callable[[], Result], device: torch.device) -> Result:
    """Run a step, and return its result; RuntimeError if the step draws random numbers on the host."""
    before = host_generators(device)
    result = run()
    if host_generators(device) != before:
        raise RuntimeError("the step draws random numbers on the host, which every replay would repeat")
    return result


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
