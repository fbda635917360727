"""How every op is registered, and which backend serves it.

One schema, one fake, one kernel per dispatch key, opaque to the compiler. Every op has two defaults on a device: for
eager calls, and inside compiled graphs, where a kernel is a wall to the compiler. Where no kernel serves, the public
function calls the reference directly, so that ``torch.compile`` can fuse it with its surroundings.

A kernel serves where it was measured ahead: on the user's machine, or on one like it that was measured for the package
(`_races`), by dtype and by size. Where nothing was measured, it serves a GPU's eager calls if forward and backward
replace a dozen launches or more, and inside compiled graphs only if compilers do not fuse the reference as well. It
serves only if it was found right on this machine (`_verify`).

Backends: ``reference`` (PyTorch, any device), ``cpp`` (C++, CPU) and ``triton`` (GPU).
``PURIFY_FAST_BACKEND`` forces one for its device, read once at import, or several, as ``cpp,triton``: each op takes
the first that it has. `use_backend` does so for a block.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from .. import _library
from ._races import Call, Winner, winner
from ._verdicts import sources_digest

Style = Literal["eager", "graph"]
KERNELS = Path(__file__).parents[1] / "kernels"

BACKENDS = {"reference": ("cpu", "cuda"), "cpp": ("cpu",), "triton": ("cuda",)}


def _checked(names: str | None) -> tuple[str, ...]:
    given = [name.strip() for name in names.split(",")] if names is not None else []
    chosen = tuple(dict.fromkeys(given))
    for name in chosen:
        if name not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise ValueError(f"backend {name!r} is unknown; there are {known} (use_backend, PURIFY_FAST_BACKEND)")
    return chosen


_forced: tuple[str, ...] = _checked(os.environ.get("PURIFY_FAST_BACKEND"))


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, ops are served by the backends of this name on their devices.

    Args:
        name: ``reference``, ``cpp`` or ``triton``, or several with commas between: of those of its device, an
            op takes the first that it has. None restores the measured default.

    Raises:
        ValueError: an unknown name. An op that has none of them raises RuntimeError when it is called.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


def forced_backends() -> tuple[str, ...]:
    """The backends that are forced now, by `use_backend` or the environment; empty if none is."""
    return _forced


def first_argument(x: torch.Tensor, *_) -> tuple[torch.dtype, int]:
    """The dtype and the number of elements of the first of an op's arguments."""
    return x.dtype, x.numel()


def second_argument(_, x: torch.Tensor, *__) -> tuple[torch.dtype, int]:
    """The dtype and the number of elements of the second of an op's arguments."""
    return x.dtype, x.numel()


@dataclass(frozen=True)
class Op:
    """One registered op: its handle, its definition, and who serves it where.

    Attributes:
        name: without the name space.
        handle: the op as PyTorch dispatches it.
        reference: the definition.
        available: device type to the backends that exist here, the kernel last.
        replaces_many: the variants whose forward and backward replace a dozen launches or more; ``""`` is the op that
            has none.
        compiler_fuses: those of them whose reference compilers fuse as well.
        sources: device type to the files that its kernel there is made of.
        launch: starts its Triton kernel; None where it has none, as an op for CPUs alone.
        weigh: of the kernel's arguments, the dtype and the number of elements that its server is chosen by.
        differentiable: whether gradients pass through the public function; those of backwards have none.
        served: the decisions that were made: by style, device, dtype, bits of the number of elements, and variant.
    """

    name: str
    handle: Callable
    reference: Callable
    available: dict[str, tuple[str, ...]]
    replaces_many: tuple[str, ...] = ()
    compiler_fuses: tuple[str, ...] = ()
    sources: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    launch: Callable | None = None
    weigh: Callable[..., tuple[torch.dtype, int]] = first_argument
    differentiable: bool = True
    served: dict[tuple[Style, torch.device, torch.dtype | None, int, str], str] = field(default_factory=dict)

    def __call__(self, *args, variant: str = ""):
        """Run on the arguments, the first a tensor: by the backend that serves such a call. No gradient is recorded."""
        dtype, size = self.weigh(*args)
        return (self.reference if self.plain(args[0].device, dtype, size, variant) else self.handle)(*args)

    def kernel(self, kind: str) -> str:
        """The backend whose kernel the handle runs on devices of a type; ``reference`` where there is none."""
        return self.available[kind][-1] if kind in self.available else "reference"

    def sources_digest(self, kind: str) -> str:
        """A hash of what the kernel on devices of a type is made of: a verdict is of this, and of nothing else."""
        return sources_digest(self.sources.get(kind, ()))

    def serves_unraced(self, style: Style) -> tuple[str, ...]:
        """The variants whose kernel serves on a GPU where nothing was raced.

        Args:
            style: eager calls, or calls inside a compiled graph.
        """
        return tuple(name for name in self.replaces_many if style == "eager" or name not in self.compiler_fuses)

    def wanted(
        self, style: Style, device: torch.device, variant: str = "", dtype: torch.dtype | None = None, bits: int = 0
    ) -> Winner:
        """The backend that serves if it is right, and why: who won a race, else by a safe rule.

        Args:
            style: eager calls, or calls inside a compiled graph.
            device: need not be here: then the rule decides.
            variant: a setting that decides how much one launch replaces, as the op's own module names it.
            dtype: of the call; None asks for what serves every dtype.
            bits: how many the number of its elements has; 0 asks for what serves every size.
        """
        kernel = self.kernel(device.type)
        if kernel == "reference":
            return Winner(kernel, "there is no kernel")
        if device.type != "cuda" or torch.cuda.is_available():
            found = winner(self.name, self.sources_digest(device.type), style, device, Call(variant, dtype, bits))
            if found is not None:
                return found if found.backend in (kernel, "reference") else replace(found, backend="reference")
        if device.type == "cuda" and variant in self.serves_unraced(style):
            return Winner(kernel, "not raced: it replaces a dozen launches or more")
        why = "it is a few launches" if style == "eager" else "compilers fuse it"
        return Winner("reference", "not raced" if device.type == "cpu" else f"not raced: {why}")

    def serving(
        self, style: Style, device: torch.device, variant: str = "", dtype: torch.dtype | None = None, bits: int = 0
    ) -> str:
        """The backend that serves unless another is forced: a kernel only once it was found right.

        Args:
            style: as in `wanted`, and so are the others.
            device: of the call.
            variant: of the call.
            dtype: of the call, or None.
            bits: of its size, or 0.
        """
        found = self.served.get((style, device, dtype, bits, variant))
        if found is None:
            found, settled = self.wanted(style, device, variant, dtype, bits).backend, True
            if found != "reference":
                right = _kernel_serves(self, device, variant, dtype)
                settled = right is not None
                found = found if right else "reference"
            if settled:
                self.served[style, device, dtype, bits, variant] = found
        return found

    def forced(self, kind: str) -> str | None:
        """The backend that is forced for devices of a type: None if none is, and empty if none of them exists here."""
        names = [name for name in _forced if kind in BACKENDS[name]]
        return next((name for name in names if name in self.available[kind]), "") if names else None

    def missing(self, kind: str) -> str:
        """What is wrong where `forced` is empty."""
        names = " and ".join(repr(name) for name in _forced if kind in BACKENDS[name])
        there = ", ".join(self.available[kind])
        return f"{self.name}: backend {names} is forced but missing; on {kind} there are: {there}"

    def choice(
        self, device: torch.device, variant: str = "", dtype: torch.dtype | None = None, bits: int = 0
    ) -> str | None:
        """The backend that serves this op on ``device``; None if what is forced there is missing."""
        forced = self.forced(device.type) if _forced else None
        if forced is not None:
            return forced or None
        if torch.compiler.is_compiling():
            return _in_graph(self.name, device.type, device.index, variant, dtype)
        return self.serving("eager", device, variant, dtype, bits)

    def served_by(
        self, device: torch.device, variant: str = "", dtype: torch.dtype | None = None, bits: int = 0
    ) -> str:
        """`choice`; raises RuntimeError if there is none."""
        chosen = self.choice(device, variant, dtype, bits)
        if chosen is None:
            raise RuntimeError(self.missing(device.type))
        return chosen

    def plain(self, device: torch.device, dtype: torch.dtype, size: int, variant: str = "") -> bool:
        """Whether the public function should call the reference directly instead of the op.

        Args:
            device: of the call.
            dtype: of the tensor that `weigh` names.
            size: the number of elements that `weigh` names.
            variant: of the call.
        """
        if not _forced and not torch.compiler.is_compiling():  # every eager call passes here: one look-up
            # a size that is a symbol, in a trace, has no bits: then what serves every size is right
            bits = size.bit_length() if type(size) is int else 0
            return (
                self.served.get(("eager", device, dtype, bits, variant))
                or self.serving("eager", device, variant, dtype, bits)
            ) == "reference"
        return self.served_by(device, variant, dtype) == "reference"


# Decided while a graph is traced, as a call of its own that is no part of it. A graph may be of every size.
@torch._dynamo.assume_constant_result
def _in_graph(name: str, kind: str, index: int | None, variant: str, dtype: torch.dtype | None) -> str:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    return REGISTRY[name].serving("graph", device, variant, dtype)


Verifier = Callable[[Op, torch.device, str, torch.dtype | None], bool | None]

#: Whether an op's kernel may serve calls of a variant and a dtype on a device; None where that cannot be told yet. The
#: package sets it to `_verify.serves`, which needs the ops to be defined.
_kernel_serves: Verifier = lambda op, device, variant, dtype: True  # noqa: E731


def set_verifier(verifier: Verifier) -> None:
    """Let ``verifier`` tell whether kernels may serve, in place of serving every one."""
    global _kernel_serves
    _kernel_serves = verifier


def forget() -> None:
    """Decide anew who serves what, as after a change of what is kept on the disk."""
    for op in REGISTRY.values():
        op.served.clear()


REGISTRY: dict[str, Op] = {}


def define_op(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    triton: Callable | None = None,
    replaces_many: bool | tuple[str, ...] = False,
    compiler_fuses: tuple[str, ...] = (),
    weigh: Callable[..., tuple[torch.dtype, int]] = first_argument,
    differentiable: bool = True,
) -> Op:
    """Register ``purify_fast::name``.

    Args:
        name: of the op, without the name space.
        schema: its signature, as ``torch.library.define`` takes it.
        reference: the definition, in PyTorch; runs under ``no_grad`` behind the op.
        fake: shapes and dtypes of the outputs.
        triton: a launcher with the op's signature, imported on first call; never sees float64.
        replaces_many: whether forward and backward together replace a dozen launches or more of the reference, or the
            variants for which they do. There the kernel serves on a GPU where nothing was raced.
        compiler_fuses: those of these variants whose reference compilers fuse as well. Inside compiled graphs the
            reference serves them.
        weigh: of the op's arguments, the dtype and the number of elements by which a race tells calls apart.
        differentiable: whether gradients pass through the public function, by a ``torch.autograd.Function`` around the
            op. The op itself records none: False says that the public function does not either, and documents it.
    """
    qualified = f"purify_fast::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_fake(qualified, fake)
    plain = torch.no_grad()(reference)  # else autograd traces the fallback
    available: dict[str, tuple[str, ...]] = {"cpu": ("reference",), "cuda": ("reference",)}
    definition = Path(reference.__code__.co_filename)
    extension = (Path(_library.path),) if _library.path else ()
    sources = {"cpu": (definition, *extension), "cuda": (definition, *extension)}
    if _library.has_kernel(qualified, "CPU"):
        available["cpu"] += ("cpp",)
    else:
        torch.library.impl(qualified, "CPU", plain)
    torch.library.impl(qualified, "CUDA", _narrow(triton, plain) if triton is not None else plain)
    available["cuda"] += ("triton",) if triton is not None else ()
    if isinstance(triton, Launcher):
        # kernels call functions of each other's modules, and definitions of each other
        sources["cuda"] = (*sorted(definition.parent.glob("[!_]*.py")), *sorted(KERNELS.glob("*.py")))
    many = replaces_many if isinstance(replaces_many, tuple) else ("",) if replaces_many else ()
    op = Op(
        name=name,
        handle=getattr(torch.ops.purify_fast, name).default,
        reference=reference,
        available=available,
        replaces_many=many,
        compiler_fuses=compiler_fuses,
        sources=sources,
        launch=triton,
        weigh=weigh,
        differentiable=differentiable,
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


@dataclass(frozen=True)
class Launcher:
    """A launcher of ``kernels/<module>.py``, imported when a GPU tensor first needs it.

    Attributes:
        module: the file's name.
        name: the function in it.
    """

    module: str
    name: str

    def __call__(self, *args):
        kernels = importlib.import_module(f"purify_fast.kernels.{self.module}")
        return getattr(kernels, self.name)(*args)


def wide(x: torch.Tensor) -> torch.Tensor:
    """float32 for half types, float64 stays: the precision losses, distances and aggregation are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
