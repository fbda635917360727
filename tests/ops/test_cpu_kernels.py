"""Kernels that save what backward needs: the results of the ops, and that they serve."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import op_cases
import pytest
import torch
from op_cases import DTYPES

from purify_fast import ops
from purify_fast.ops import aggregate, use_backend
from purify_fast.ops.dispatch.examples import tensors
from purify_fast.ops.dispatch.gradient import SAVING_KERNELS
from purify_fast.ops.dispatch.registry import Op

loss_op, latent_op, distance_op, aggregate_op = (
    import_module(f"purify_fast.ops.{name}")
    for name in ("reconstruction_loss", "sample_latent", "representation_distance", "aggregate")
)
normal = partial(op_cases.normal, dtype=torch.float32)
needs_kernels = pytest.mark.skipif(not SAVING_KERNELS, reason="the kernels are the extension's")


def served_by_saving(out: torch.Tensor) -> bool:
    functions = [op._with_saved.__self__ for op in (loss_op, latent_op, distance_op, aggregate_op)]
    return getattr(out.grad_fn, "_forward_cls", None) in functions


SEED, IDS = torch.tensor([5]), torch.arange(3)
#: Functions of two tensors, of which the first has a gradient.
CALLS = {
    **{f"aggregate {name}": lambda x, _, name=name: aggregate(x, name) for name in ("lse", "peel")},
    "reconstruction_loss": lambda x, y: ops.reconstruction_loss(x, y.abs().clamp(max=1)),
    "sample_latent": lambda x, y: ops.sample_latent(x.flatten(1), y.flatten(1), SEED, IDS),
    **{
        f"representation_distance {kind}": lambda x, y, kind=kind: ops.representation_distance(x, y, kind)
        for kind in distance_op.KINDS
    },
}


def results(call: Callable, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, and the gradient of a sum with weights that every dtype has."""
    leaf = x.clone().requires_grad_()
    outputs = tensors(call(leaf, y))
    total = sum((out * (torch.arange(out.numel()) % 7 - 3).to(out.dtype).view_as(out) / 4).sum() for out in outputs)
    return [*(out.detach() for out in outputs), torch.autograd.grad(total, leaf)[0]]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(within_budget, poisoned, monkeypatch, name, dtype):
    """The saved tensors are as near to the definition in float64 as the definition in the same dtype is."""
    for size, scale in ((20, 1.0), (101, 20.0), (1300, 1.0)):
        x, y = scale * normal(2, 3, 5, size, dtype=dtype)
        with use_backend("cpp"), monkeypatch.context() as patch:
            assert served_by_saving(tensors(CALLS[name](x.clone().requires_grad_(), y))[0])
            found = results(CALLS[name], x, y)
            # the definition with the kernel's normals, which differ by a few units in the last place
            patch.setattr(Op, "uses_reference", lambda op, *_: op.name != "philox")
            golden, same = results(CALLS[name], x.double(), y.double()), results(CALLS[name], x, y)
        for triple in zip(found, golden, same, strict=True):
            within_budget(*triple)


def test_a_tangent_is_refused_and_not_lost(backend):
    x = normal(2, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        if backend == "reference":
            assert torch.autograd.forward_ad.unpack_dual(ops.gated_elu(dual)).tangent is not None
        else:
            with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
                ops.gated_elu(dual)
