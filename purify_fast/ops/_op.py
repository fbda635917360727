"""How every op is registered, and which backend serves it.

One schema, one fake, one kernel per dispatch key, opaque to the compiler. A kernel that wins serves eager calls; inside
a compiled graph, and where no kernel wins, the public function calls the reference directly, so that ``torch.compile``
can fuse it with its surroundings.

Backends: ``reference`` (PyTorch, any device), ``cpp`` (C++, CPU), ``triton`` and ``cuda`` (GPU).
``PURIFY_FAST_BACKEND`` forces one for its device, read once at import, or several, as ``triton,cuda``: each op takes
the first that it has. `use_backend` does so for a block.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .. import _library

BACKENDS = {"reference": ("cpu", "cuda"), "cpp": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}


def _checked(names: str | None) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in names.split(",")) if names is not None else ()
    for name in chosen:
        if name not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise ValueError(f"backend {name!r} is unknown; there are {known} (use_backend, PURIFY_FAST_BACKEND)")
    return chosen


_forced: tuple[str, ...] = _checked(os.environ.get("PURIFY_FAST_BACKEND"))


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, ops on ``name``'s device are served by ``name``; None restores the measured default.

    Several are given as ``"triton,cuda"``: of those of its device, an op takes the first that it has.

    Raises:
        ValueError: an unknown name. An op that has none of them raises RuntimeError when it is called.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


@dataclass(frozen=True)
class Op:
    """One registered op: its handle, its definition, and who serves it where."""

    name: str
    handle: Callable
    reference: Callable
    available: dict[str, tuple[str, ...]]  # device type -> backends that exist here
    default: dict[str, str]  # device type -> backend measured best
    why: dict[str, str]  # device type -> reason for the default, for `purify-fast info`

    def __call__(self, *args):
        """Run on the arguments, the first a tensor: by the backend that serves its device. No gradient is recorded."""
        return (self.reference if self.plain(args[0].device) else self.handle)(*args)

    def choice(self, device: torch.device) -> str | None:
        """The backend that serves this op on ``device``; None if what is forced there is missing."""
        kind = device.type
        forced = [name for name in _forced if kind in BACKENDS[name]]
        if forced:
            return next((name for name in forced if name in self.available[kind]), None)
        return self.default.get(kind, "reference")

    def served_by(self, device: torch.device) -> str:
        """`choice`; raises RuntimeError if there is none."""
        chosen = self.choice(device)
        if chosen is None:
            forced = " and ".join(repr(name) for name in _forced if device.type in BACKENDS[name])
            raise RuntimeError(
                f"{self.name}: backend {forced} is forced but missing; on {device.type} there are: "
                f"{', '.join(self.available[device.type])}"
            )
        return chosen

    def plain(self, device: torch.device) -> bool:
        """Whether the public function should call the reference directly instead of the op.

        Always so inside a compiled graph, unless a backend is forced: the compiler fuses the reference with what
        surrounds it, and an op is a wall to it.
        """
        if not _forced and torch.compiler.is_compiling():
            return True
        return self.served_by(device) == "reference"


REGISTRY: dict[str, Op] = {}


def define_op(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    triton: Callable | None = None,
    cpu: str = "reference",
    cuda: str = "reference",
    why_cpu: str = "",
    why_cuda: str = "GPU kernels are opt-in: not yet run on a GPU",
) -> Op:
    """Register ``purify_fast::name``.

    Args:
        name, schema: the op and its signature, as ``torch.library.define`` takes them.
        reference: the definition, in PyTorch; runs under ``no_grad`` behind the op.
        fake: shapes and dtypes of the outputs.
        triton: a launcher with the op's signature, imported on first call; never sees float64.
        cpu, cuda: the backend the benchmarks chose for that device; a missing one falls to the reference.
        why_cpu, why_cuda: the reason, one line, shown by ``purify-fast info``.
    """
    qualified = f"purify_fast::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_fake(qualified, fake)
    plain = torch.no_grad()(reference)  # else autograd traces the fallback
    available: dict[str, tuple[str, ...]] = {"cpu": ("reference",), "cuda": ("reference",)}
    if _library.has_kernel(qualified, "CPU"):
        available["cpu"] += ("cpp",)
    else:
        torch.library.impl(qualified, "CPU", plain)
    if _library.has_kernel(qualified, "CUDA"):  # a built CUDA C++ kernel owns the key, Triton stands in without it
        available["cuda"] += ("cuda",)
    else:
        torch.library.impl(qualified, "CUDA", _narrow(triton, plain) if triton is not None else plain)
        available["cuda"] += ("triton",) if triton is not None else ()
    op = Op(
        name,
        getattr(torch.ops.purify_fast, name).default,
        reference,
        available,
        {kind: best if best in available[kind] else "reference" for kind, best in (("cpu", cpu), ("cuda", cuda))},
        {"cpu": why_cpu, "cuda": why_cuda},
    )
    REGISTRY[name] = op
    return op


def _narrow(kernel: Callable, plain: Callable) -> Callable:
    """``kernel``, but float64 goes to the reference: the Triton kernels compute in float32."""

    def launch(*args):
        flat = [one for arg in args for one in (arg if isinstance(arg, (list, tuple)) else [arg])]
        double = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float64 for arg in flat)
        return (plain if double else kernel)(*args)

    return launch


def launcher(module: str, name: str) -> Callable:
    """``kernels/<module>.py``'s launcher ``name``, imported when a GPU tensor first needs it."""

    def launch(*args):
        kernels = __import__(f"purify_fast.kernels.{module}", fromlist=[name])
        return getattr(kernels, name)(*args)

    return launch


def wide(x: torch.Tensor) -> torch.Tensor:
    """float32 for half types, float64 stays: the precision losses, distances and aggregation are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
