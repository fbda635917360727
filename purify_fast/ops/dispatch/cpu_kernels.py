"""Kernels that save what backward needs, where that is faster than to compute it again: on a CPU, in eager calls.

An op's own backward computes everything from the op's inputs, since on a GPU arithmetic is cheaper than memory. On a
CPU it is not: a sigmoid, a normal or a difference that forward had in a register costs one store to save and one load
to read, where backward would need dozens of instructions, or a second matrix to read. ``torch.compile`` saves them too.
The results are those of the op and of its backward, to the last bit or two. These kernels stand in for the op's own
wherever its own would serve both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import _library
from .registry import Op


def kernel(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Declare a kernel of the compiled extension that is no op of its own.

    Args:
        name: without the name space.
        schema: its signature, as ``torch.library.define`` takes it.
        fake: shapes and dtypes of the outputs, for tensors without data.

    Returns:
        Its handle. It can be called where `AVAILABLE` is true.
    """
    torch.library.define(f"purify_fast::{name}", schema)
    torch.library.register_fake(f"purify_fast::{name}", fake)
    handle: Callable[..., Any] = getattr(torch.ops.purify_fast, name).default
    return handle


#: grad [B] times rows [B, ...], one factor per row, rounded to a dtype.
SCALED_ROWS = kernel(
    "scaled_rows",
    "(Tensor grad, Tensor rows, ScalarType dtype) -> Tensor",
    lambda grad, rows, dtype: rows.new_empty(rows.shape, dtype=dtype),
)
#: False where the extension is missing, or was built before these kernels were written.
AVAILABLE = _library.has_kernel("purify_fast::scaled_rows", "CPU")


def may_serve(x: Tensor) -> bool:
    """Whether kernels that only a CPU has can be called: not on a GPU, in compiled graphs or functorch's transforms."""
    if not AVAILABLE or x.device.type != "cpu":
        return False
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def serves(backward: Op, x: Tensor) -> bool:
    """Whether a saving kernel stands in for an op that serves forward: its backward must be served by a kernel too."""
    return may_serve(x) and not backward.plain(x.device, x.dtype, x.numel())
