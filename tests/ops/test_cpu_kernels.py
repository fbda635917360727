"""Kernels that save what backward needs: the results of the ops, and who serves when."""

from __future__ import annotations

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
from purify_fast.ops.dispatch.cpu_kernels import AVAILABLE
from purify_fast.ops.dispatch.gradient import needs_gradient

loss_op, latent_op, distance_op, aggregate_op = (
    import_module(f"purify_fast.ops.{name}")
    for name in ("reconstruction_loss", "sample_latent", "representation_distance", "aggregate")
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((1, 1), (3, 1, 16, 16), (2, 3, 33, 31), (4, 5001), (0, 3, 4, 4))
needs_kernels = pytest.mark.skipif(not AVAILABLE, reason="the kernels are the extension's")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def served_by_saving(out: torch.Tensor) -> bool:
    functions = [op._with_saved.__self__ for op in (loss_op, latent_op, distance_op, aggregate_op)]
    return type(out.grad_fn)._forward_cls in functions


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reconstruction_loss(shape, dtype, within_budget):
    logits, target = 4 * normal(*shape, dtype=dtype), normal(*shape, seed=1).sigmoid().to(dtype)
    leaf = logits.clone().requires_grad_()
    with use_backend("cpp"):
        loss = reconstruction_loss(leaf, target)
        assert served_by_saving(loss) and torch.equal(loss, reconstruction_loss(logits, target))
        upstream = torch.linspace(-1, 2, len(loss), dtype=loss.dtype)
        (grad,) = torch.autograd.grad(loss, leaf, upstream)
    exact = loss_op.reference_backward(upstream.double(), logits.double(), target.double())
    within_budget(grad, exact, loss_op.reference_backward(upstream, logits, target))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 37), (2, 1026), (0, 8), (4, 0)], ids=str)
def test_sample_latent(shape, dtype):
    mu, logvar = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    stream = torch.tensor([5]), torch.arange(shape[0])
    results = []
    with use_backend("cpp"):
        for saves in (True, False):
            leaves = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
            call = sample_latent if saves else latent_op._sample_latent
            z, kl = call(*leaves, *stream)
            assert served_by_saving(z) == saves
            upstream = normal(*shape, seed=2, dtype=dtype), torch.linspace(-1, 2, shape[0]).to(kl.dtype)
            results.append((z, kl, *torch.autograd.grad((z, kl), leaves, upstream)))
    for kept, own in zip(*results, strict=True):
        # within one rounding: one of them may fuse a multiplication with an addition
        torch.testing.assert_close(kept, own, rtol=4 * torch.finfo(own.dtype).eps, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("kind", distance_op.KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# not (1, 1): two single numbers are parallel, and all of their slope is rounding
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_representation_distance(shape, dtype, kind, within_budget):
    u, v = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    leaf = u.clone().requires_grad_()
    with use_backend("cpp"):
        out = representation_distance(leaf, v, kind)
        assert served_by_saving(out) and torch.equal(out, representation_distance(u, v, kind))
        upstream = torch.linspace(-1, 2, len(out), dtype=out.dtype)
        (grad,) = torch.autograd.grad(out, leaf, upstream)
    results = []
    for wanted in (torch.float64, dtype):
        given = [x.to(wanted) for x in (u, v)]
        slopes = distance_op.reference([given[0]], [given[1]], distance_op.KINDS.index(kind))[1]
        results += distance_op.reference_backward(upstream.to(slopes.dtype)[:, None], [given[0]], [given[1]], slopes)
    within_budget(grad, *results)


@pytest.mark.skipif(not aggregate_op.SAVES, reason="the kernels are the extension's")
@pytest.mark.parametrize("method", ["lse", "peel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# whole groups of lanes; one that overlaps another; several calls of lanes; no image
@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 8, 37), (2, 3, 200), (0, 4, 20)], ids=str)
def test_aggregate(shape, dtype, method, within_budget):
    logits = (3 * normal(*shape)).to(dtype)
    if shape[0]:  # both are as large as exp's tangent bears; and one that is all of its class
        logits[0, :2, 3], logits[0, 1, 5] = 1e4, 60
    leaf, index = logits.clone().requires_grad_(), aggregate_op.METHODS.index(method)
    with use_backend("cpp"):
        out = aggregate(leaf, method)
        assert served_by_saving(out)
        torch.testing.assert_close(out, aggregate(logits, method), rtol=1e-6, atol=1e-6)
        upstream = normal(shape[0], shape[2], seed=1, dtype=out.dtype)
        (grad,) = torch.autograd.grad(out, leaf, upstream)
    within_budget(out, aggregate_op.reference(logits.double(), index), aggregate_op.reference(logits, index))
    exact = aggregate_op.reference_backward(upstream.double(), logits.double(), index)
    within_budget(grad, exact, aggregate_op.reference_backward(upstream, logits, index))


@pytest.mark.skipif(not aggregate_op.SAVES, reason="the kernels are the extension's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shapes_without_data(dtype):
    """Every function that saves something, forward and backward, in tensors without data as in real ones."""
    stream = torch.tensor([5]), torch.arange(3)
    calls = [
        ((3, 5, 20), lambda x: aggregate(x, "peel")),
        ((3, 7), lambda x: reconstruction_loss(x, x.detach().sigmoid())),
        ((3, 7), lambda x: sample_latent(x, x.detach(), *stream)[0]),
        ((3, 7), lambda x: representation_distance(x, 2 * x.detach() + 1)),
    ]

    def results(call, x):
        out = call(x.requires_grad_())
        assert served_by_saving(out)
        return out.detach(), *torch.autograd.grad(out.sum(), x)

    for shape, call in calls:
        x = normal(*shape).to(dtype)
        with use_backend("cpp"):
            wanted = results(call, x.clone())
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                made = results(call, mode.from_tensor(x))
        found, real = ([(t.shape, t.stride(), t.dtype) for t in those] for those in (made, wanted))
        assert found == real


@pytest.mark.skipif(not aggregate_op.SAVES, reason="the kernels are the extension's")
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
def test_several_layers_compute_their_slope_in_backward():
    u, v = normal(3, 8).requires_grad_(), normal(3, 8, seed=1)
    with use_backend("cpp"):
        assert not served_by_saving(representation_distance([u, u], [v, v]))


@needs_kernels
def test_nothing_is_saved_where_the_reference_serves_backward(monkeypatch):
    logits, target = normal(3, 8).requires_grad_(), torch.rand(3, 8)
    with use_backend("cpp"):
        monkeypatch.setattr(type(loss_op.BACKWARD), "plain", lambda op, *_: op is loss_op.BACKWARD)
        assert not served_by_saving(reconstruction_loss(logits, target))


@needs_kernels
def test_a_second_derivative_is_refused():
    logits, target = normal(3, 8).requires_grad_(), torch.rand(3, 8)
    with use_backend("cpp"):
        (grad,) = torch.autograd.grad(reconstruction_loss(logits, target).square().sum(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_a_function_is_applied_only_where_a_gradient_may_flow():
    x = normal(2, 4)
    assert not needs_gradient(x)
    x.requires_grad_()
    assert needs_gradient(x)
    with torch.no_grad():
        assert not needs_gradient(x)
    with torch.autograd.forward_ad.dual_level():
        assert needs_gradient(x.detach())


def test_a_tangent_is_refused_and_not_lost(backend):
    x = normal(2, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        if backend == "reference":
            assert torch.autograd.forward_ad.unpack_dual(gated_elu(dual)).tangent is not None
        else:
            with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
                gated_elu(dual)
