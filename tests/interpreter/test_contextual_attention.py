from importlib import import_module

import pytest
import torch

from purify_fast.kernels import contextual_attention as kernel
from purify_fast.ops.dispatch.examples import double

op = import_module("purify_fast.ops.contextual_attention")
#: samples, height, width; a thread has four keys where the width is a multiple of four, and there is more than one row
GRIDS = ((2, 3, 3), (1, 2, 5), (1, 5, 2), (1, 1, 4), (1, 4, 1), (2, 1, 1), (2, 2, 4), (1, 2, 8), (1, 5, 4))
SHORT = [(GRIDS[1], torch.bfloat16), (GRIDS[1], torch.float16), (GRIDS[7], torch.bfloat16)]
#: The largest.
LONG = GRIDS[7:]
CASES = [
    pytest.param(grid, dtype, marks=[pytest.mark.slow] * (grid in LONG))
    for grid, dtype in [*((grid, torch.float32) for grid in GRIDS), *SHORT]
]


def inputs(batch: int, height: int, width: int, dtype=torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, height * width, 5, generator=generator) * 0.4
    keep = (torch.rand(batch, height * width, generator=generator) > 0.3).to(dtype)
    return pixels @ pixels.mT, op._inverse_norms(pixels, height, width), keep, height, width, 1.0


@pytest.mark.parametrize(("grid", "dtype"), CASES, ids=str)
def test_values_and_gradients(within_budget, poisoned, grid, dtype):
    arguments = inputs(*grid, dtype=dtype)
    golden, same = op.reference(*double(arguments)), op.reference(*arguments)
    for triple in zip(kernel.forward(*arguments), golden, same, strict=True):
        within_budget(*triple)
    grad = torch.randn(golden[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    arguments = (grad, *arguments[:2], same[1], *arguments[3:])
    outputs, same = kernel.backward(*arguments), op.reference_backward(*arguments)
    for triple in zip(outputs, op.reference_backward(*double(arguments)), same, strict=True):
        within_budget(*triple)


def test_more_queries_than_a_program_adds(within_budget, monkeypatch):
    monkeypatch.setattr(kernel, "QUERIES", 4)
    arguments = inputs(1, 3, 3)
    weights = op.reference(*arguments)[1]
    grad = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    arguments = (grad, *arguments[:2], weights, *arguments[3:])
    outputs, same = kernel.backward(*arguments), op.reference_backward(*arguments)
    for triple in zip(outputs, op.reference_backward(*double(arguments)), same, strict=True):
        within_budget(*triple)
