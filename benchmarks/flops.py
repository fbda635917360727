"""FLOP counted while a function runs, also through an attack on a model whose weights are trained."""

from __future__ import annotations

from types import SimpleNamespace

from torch.utils.flop_counter import FlopCounterMode


class _NoModules(SimpleNamespace):
    """Stands where PyTorch's counter watches modules; everything then counts as one."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class Flops(FlopCounterMode):
    """PyTorch's counter without its hooks at the modules' inputs.

    Those hooks count by module. They refuse an attack: it differentiates to a leaf that a module reads, by
    `torch.autograd.grad`.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoModules(parents={"Global"})  # type: ignore[assignment]

    @property
    def total(self) -> int:
        """How many there were."""
        return self.get_total_flops()
