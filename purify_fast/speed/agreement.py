"""A captured step is checked once against the step itself, before it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: The error that is allowed, relative to the largest value, and the share of the values that may err by more.
ROUNDING, OTHER_SIGNS = 1e-3, 0.05


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
    gpu = device.type == "cuda"
    begin = torch.cuda.get_rng_state(device) if gpu else torch.get_rng_state()
    # what is a buffer itself is overwritten by the replay
    wanted = {name: value.clone() for name, value in step().items()}
    if gpu:
        torch.cuda.set_rng_state(begin, device)
    else:
        torch.set_rng_state(begin)
    replay()
    return all(alike(buffers[name], value) for name, value in wanted.items() if value.is_floating_point())


def alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results of a step are the same, but for sums that a library adds in another order; waits.

    Where a gradient is nearly 0 another order gives another sign, and the step goes the other way.

    Args:
        found: floating point, any shape.
        wanted: likewise.
    """
    if not wanted.numel():
        return True
    finite = torch.where(wanted.isfinite(), wanted, 0.0)
    close = (found - wanted).abs() <= ROUNDING * finite.abs().amax()
    same = (found == wanted) | (found.isnan() & wanted.isnan()) | close
    return bool(same.float().mean() >= 1 - OTHER_SIGNS)
