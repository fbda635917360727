"""Count the floating point operations (FLOP) of the matrix products and convolutions in a call."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from torch.utils.flop_counter import FlopCounterMode

from purify_fast.ops import use_backend


class _NoModules(SimpleNamespace):
    """Replaces the part of PyTorch's counter that tracks modules, so that all operators are counted together."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class Flops(FlopCounterMode):
    """PyTorch's counter of FLOP without the hooks that count for each module separately.

    These hooks raise an error in an attack, where `torch.autograd.grad` computes the gradient of a module's input.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoModules(parents={"Global"})


def flop_of(run: Callable[[], object]) -> int:
    """Call a function, and return the FLOP of its matrix products and convolutions."""
    # The references of this package's ops consist of operators that PyTorch counts.
    with use_backend("reference"), Flops() as counter:
        run()
    return counter.get_total_flops()
