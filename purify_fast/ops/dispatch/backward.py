"""Registers the backward of an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .example_tensors import tensors
from .examples import Example, normal, properties_of
from .registry import Op, define_op


def define_backward(
    op: Op,
    schema: str,
    *,
    reference: Callable,
    fake: Callable = lambda grad, x, *_: x.new_empty(x.shape),
    size: Callable[..., int] = lambda _, x, *__: x.numel(),
    saved: Callable[[tuple, tuple], tuple] = lambda inputs, outputs: inputs,
    constants: int = 0,
    changes: dict[str, Any] | None = None,
    **flags: Any,
) -> Op:
    """Register the backward of an op. ``saved`` makes the arguments that follow the gradients.

    ``flags`` are the arguments ``cpu``, ``cuda`` and ``in_graphs`` that differ from those of the op.
    """

    def derived(example: Example) -> Example:
        def make(dtype: torch.dtype, seed: int) -> tuple:
            inputs = example.make(dtype, seed)
            outputs = tensors(op.reference(*inputs))
            changing = enumerate(outputs[: len(outputs) - constants])
            grads = [torch.empty_like(one).copy_(normal(seed + 500 + i, *one.shape)) for i, one in changing]
            return *grads, *saved(inputs, outputs)

        return replace(example, make=make, **properties_of(example.setting, changes or {}))

    return define_op(
        f"{op.name}_backward",
        schema,
        reference=reference,
        fake=fake,
        examples=[derived(example) for example in op.examples],
        size=size,
        **op.smallest | {"in_graphs": op.in_graphs} | flags,
    )
