"""Gradients pass through every op as they pass through its definition, unless the op is declared to have none.

`define_op` registers no gradient: an op whose public function returns what the op gives has outputs that seem to
require a gradient, and a backward that reaches nothing.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from purify_fast import ops
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch.registry import Op

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks.ops import Case, normal, registry  # noqa: E402

#: An op that is not registered under the name of its function, and that is raced by a benchmark of its own.
CONVOLUTION = Case(
    (2, 8, 6, 6), torch.float32,
    lambda: (normal(2, 8, 6, 6, dtype=torch.float32), normal(4, 8, 3, 3, dtype=torch.float32)),
    lambda x, weight: ops.conv2d(x.bfloat16(), weight.bfloat16(), None, padding=1), {}, {},
)  # fmt: skip
PUBLIC = [name for name in REGISTRY if not name.endswith(("_backward", "_gradient"))]


def smallest(name: str) -> Case:
    """The smallest input of an op's benchmark."""
    if name == "convolution":
        return CONVOLUTION
    found = (registry("cuda") | registry("cpu")).get(name)
    assert found is not None, f"{name} is not in benchmarks/ops/__init__.py"
    case = min(found(), key=lambda case: math.prod(case.shape))
    # its benchmark races what one writes without the op, where no kernel serves
    return replace(case, call=ops.representation_distance) if name == "representation_distance" else case


def gradients(case: Case, plain: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Of the sum of the outputs, by every floating-point input: through the definition, or through the op."""
    monkeypatch.setattr(Op, "plain", lambda *_: plain)
    given = [x.detach().requires_grad_(x.is_floating_point()) for x in case.inputs()]
    out = case.call(*given)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    total = sum(one.float().sum() for one in outputs if one.is_floating_point() and one.requires_grad)
    if isinstance(total, Tensor):
        total.backward()
    return [x.grad for x in given if x.is_floating_point()]


@pytest.mark.parametrize("name", PUBLIC)
def test_gradients_pass_through_the_op_as_through_its_definition(name, monkeypatch):
    assert name == "convolution" or callable(getattr(ops, name, None)), f"{name} is not exported by ops/__init__.py"
    case = smallest(name)
    by_definition, by_op = (gradients(case, plain, monkeypatch) for plain in (True, False))
    there = [grad is not None for grad in by_definition]
    assert any(there) == REGISTRY[name].differentiable, (
        f"{name}: gradients reach the inputs {there}, and differentiable is {REGISTRY[name].differentiable}: "
        "put a torch.autograd.Function around it, or declare differentiable=False (docs/extend.md)"
    )
    assert there == [grad is not None for grad in by_op], f"{name}: gradients are lost where a kernel serves"
    for definition, op in zip(by_definition, by_op, strict=True):
        if definition is not None:
            assert op.abs().max() > 0
            error = (op.double() - definition.double()).norm() / definition.double().norm()
            assert error < (0.02 if case.dtype == torch.bfloat16 or name == "convolution" else 1e-4)
