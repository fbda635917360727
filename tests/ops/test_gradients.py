"""Gradients pass through every op as they pass through its definition, unless the op has no backward."""

from contextlib import nullcontext

import pytest
import torch
from op_table import FUNCTIONS

from purify_fast.ops import REGISTRY, use_backend
from purify_fast.ops.dispatch.examples import tensors
from purify_fast.ops.dispatch.registry import Op


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_pass_through_an_op_as_through_its_definition(name, monkeypatch):
    found = []
    for plain in (True, False):
        monkeypatch.setattr(Op, "uses_reference", lambda *_, plain=plain: plain)
        given = [x.requires_grad_(x.is_floating_point()) for x in FUNCTIONS[name].make(3)]
        with use_backend("reference") if plain else nullcontext():
            outputs = [out.sum() for out in tensors(FUNCTIONS[name].call(*given)) if out.requires_grad]
        if outputs:
            sum(outputs).backward()
        found.append([x.grad for x in given if x.grad is not None])
    by_definition, by_op = found
    assert len(by_definition) == len(by_op) and bool(by_op) == (f"{name.partition(' ')[0]}_backward" in REGISTRY)
    for definition, op in zip(by_definition, by_op, strict=True):
        assert op.any() or name == "aggregate vote"
        torch.testing.assert_close(op, definition, rtol=1e-4, atol=1e-5)
