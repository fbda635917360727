"""Kernels that save what backward needs: the results of the ops, and who serves when."""

from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from purify_fast.ops import (
    aggregate,
    gated_elu,
    reconstruction_loss,
    representation_distance,
    sample_latent,
    use_backend,
)
from purify_fast.ops.dispatch.gradient import SAVING_KERNELS

loss_op, latent_op, distance_op, aggregate_op = (
    import_module(f"purify_fast.ops.{name}")
    for name in ("reconstruction_loss", "sample_latent", "representation_distance", "aggregate")
)
needs_kernels = pytest.mark.skipif(not SAVING_KERNELS, reason="the kernels are the extension's")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def served_by_saving(out: torch.Tensor) -> bool:
    functions = [op._with_saved.__self__ for op in (loss_op, latent_op, distance_op, aggregate_op)]
    return getattr(out.grad_fn, "_forward_cls", None) in functions


@needs_kernels
@pytest.mark.parametrize(
    "call",
    [
        lambda x: aggregate(x, "peel"),
        lambda x: reconstruction_loss(x, x.detach().sigmoid()),
        lambda x: sample_latent(x[:, 0], x[:, 0].detach(), torch.tensor([5]), torch.arange(3))[0],
        lambda x: representation_distance(x, 2 * x.detach() + 1),
    ],
    ids=["aggregate", "reconstruction_loss", "sample_latent", "representation_distance"],
)
def test_tensors_without_data_are_served_by_the_op_itself(call):
    with use_backend("cpp"):
        assert served_by_saving(call(normal(3, 5, 20).requires_grad_()))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            out = call(mode.from_tensor(normal(3, 5, 20)).requires_grad_())
            assert not served_by_saving(out)
            out.sum().backward()


@needs_kernels
def test_few_classes_and_infinite_logits():
    """Few classes have the op's own backward; of infinite logits both make NaN where torch.softmax does."""
    with use_backend("cpp"):
        assert not served_by_saving(aggregate(normal(3, 4, 10).requires_grad_()))
        logits = normal(2, 4, 20)
        logits[0, 1, 3], logits[1, :, 7] = torch.inf, -torch.inf
        leaf, upstream = logits.clone().requires_grad_(), normal(2, 20, seed=1)
        out = aggregate(leaf)
        (grad,) = torch.autograd.grad(out, leaf, upstream)
    wanted = aggregate_op.reference_backward(upstream, logits, 0)
    assert torch.equal(out.isinf(), aggregate_op.reference(logits, 0).isinf()) and torch.equal(
        grad.isnan(), wanted.isnan()
    )


@needs_kernels
def test_nothing_is_saved_of_several_layers_and_where_the_reference_serves_backward(monkeypatch):
    logits, target = normal(3, 8).requires_grad_(), torch.rand(3, 8)
    with use_backend("cpp"):
        assert not served_by_saving(representation_distance([logits, logits], [target, target]))
        monkeypatch.setattr(type(loss_op.BACKWARD), "uses_reference", lambda op, *_: op is loss_op.BACKWARD)
        assert not served_by_saving(reconstruction_loss(logits, target))


def test_a_tangent_is_refused_and_not_lost(backend):
    x = normal(2, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        if backend == "reference":
            assert torch.autograd.forward_ad.unpack_dual(gated_elu(dual)).tangent is not None
        else:
            with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
                gated_elu(dual)
