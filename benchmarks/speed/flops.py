"""Count the floating point operations (FLOP) of the matrix products and convolutions in a call."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

from torch.utils.flop_counter import FlopCounterMode

from purify_fast.ops import use_backend


def flop_of(run: Callable[[], object]) -> int:
    """Call a function, and return the FLOP of its matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    # The hooks that count for each module separately raise an error in an attack, where `torch.autograd.grad` computes
    # the gradient of a module's input.
    counter.mod_tracker = mock.MagicMock(parents={"Global"})
    # The references of this package's ops consist of operators that PyTorch counts.
    with use_backend("reference"), counter:
        run()
    return counter.get_total_flops()
