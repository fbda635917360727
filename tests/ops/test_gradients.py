"""Gradients pass through every op as they pass through its definition, unless the op is declared to have none."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.speed.op_cases import Case, normal, registry
from purify_fast import ops
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch.registry import Op

#: An op that is not registered under the name of its function, and that has no benchmark of its own.
CONVOLUTION = Case(
    lambda: (normal(2, 8, 6, 6, dtype=torch.float32), normal(4, 8, 3, 3, dtype=torch.float32)),
    lambda x, weight: ops.conv2d(x.bfloat16(), weight.bfloat16(), None, padding=1),
    {},
)
#: The gradients of a fused layer, whose benchmarks are large, have tests of their own.
PUBLIC = [name for name in REGISTRY if not name.endswith(("_backward", "_gradient"))]


def smallest(name: str) -> Case:
    """The smallest input of an op's benchmark."""
    if name == "convolution":
        return CONVOLUTION
    found = (registry("cuda") | registry("cpu")).get(name)
    assert found is not None, f"{name} is not in benchmarks/speed/op_cases.py"
    case = min(found(), key=lambda case: math.prod(case.shape))
    # its benchmark races what one writes without the op, where no kernel serves
    return replace(case, call=ops.representation_distance) if name == "representation_distance" else case


def gradients(case: Case, plain: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The gradients of the outputs' sum by every floating-point input: through the definition, or the op."""
    monkeypatch.setattr(Op, "uses_reference", lambda *_: plain)
    given = [x.detach().requires_grad_(x.is_floating_point()) for x in case.inputs()]
    out = case.call(*given)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    total = sum(one.float().sum() for one in outputs if one.is_floating_point() and one.requires_grad)
    if isinstance(total, Tensor):
        total.backward()
    return [x.grad for x in given if x.is_floating_point()]


@pytest.mark.parametrize("name", PUBLIC)
def test_gradients_pass_through_the_op_as_through_its_definition(name, monkeypatch):
    public = {"convolution": "conv2d", "decode_samples": "decode_prior"}.get(name, name)
    assert callable(getattr(ops, public, None)), f"{public} is not exported by ops/__init__.py"
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
