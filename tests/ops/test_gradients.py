"""Gradients pass through every op as they pass through its definition, unless the op is declared to have none."""

import math
from dataclasses import replace

import pytest
import torch
from op_table import public_name
from torch import Tensor

from benchmarks.speed.op_cases import Case, normal, registry
from purify_fast import ops
from purify_fast.methods.carso.networks import Decoder, published_decoder
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch.registry import Op
from purify_fast.speed.decoding import PackedDecoder

SIZES = (3, 32, 32), 512, 128


def decoded(condition: Tensor, seed: Tensor, ids: Tensor) -> Tensor:
    """Eight samples of each image, by the decoder of the CARSO paper with the same random weights in every call."""
    image, width, latent = SIZES
    torch.manual_seed(0)
    decoder = PackedDecoder(Decoder(latent, width, image, *published_decoder(image)).eval())
    return decoder(condition, seed, ids, 8, channels_last=True, dtype=torch.bfloat16)


#: Ops whose benchmark is no measurement of a single op on a CPU.
OTHERS = {
    "decode_samples": Case(
        lambda: (normal(8, SIZES[1], dtype=torch.float32), torch.tensor([7]), torch.arange(8)),
        decoded,
        {},
        dtype=torch.bfloat16,
    ),
    "square_proposal": Case(
        lambda: tuple(torch.rand(shape) for shape in ((16, 3, 32, 32), (16, 3, 32, 32), (16, 2, 8))),
        lambda x, nat, numbers: ops.square_proposal(x, nat, 8 / 255, numbers, 5, "linf", 0.0, 1.0),
        {},
    ),
}
#: The gradients of a fused layer, whose benchmarks are large, have tests of their own.
PUBLIC = [name for name in REGISTRY if not name.endswith("_backward")]


def smallest(name: str) -> Case:
    """The smallest input of an op's benchmark."""
    if name in OTHERS:
        return OTHERS[name]
    found = registry().get(name)
    assert found is not None, f"{name} is not in benchmarks/speed/op_cases.py"
    case = min(found(), key=lambda case: math.prod(case.shape))
    # its benchmark times what one writes without the op, where no kernel is used
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
    assert public_name(name), f"purify_fast/ops/__init__.py exports no function of {name}.py"
    case = smallest(name)
    by_definition, by_op = (gradients(case, plain, monkeypatch) for plain in (True, False))
    there = [grad is not None for grad in by_definition]
    assert any(there) == REGISTRY[name].differentiable, (
        f"{name}: gradients reach the inputs {there}, and differentiable is {REGISTRY[name].differentiable}: "
        "put a torch.autograd.Function around it, or declare differentiable=False (docs/extend.md)"
    )
    assert there == [grad is not None for grad in by_op], f"{name}: gradients are lost where a kernel is used"
    for definition, op in zip(by_definition, by_op, strict=True):
        if definition is not None:
            assert op.abs().max() > 0
            error = (op.double() - definition.double()).norm() / definition.double().norm()
            assert error < (0.02 if case.dtype == torch.bfloat16 else 1e-4)
