from __future__ import annotations

from importlib import import_module

import pytest
import torch

from purify_fast.kernels import philox as stream
from purify_fast.kernels import sample_latent as kernel
from purify_fast.ops import Stream

op = import_module("purify_fast.ops.sample_latent")
SEED = torch.tensor([987654321])
SHAPES = ((1, 1), (3, 64), (5, 37), (2, 1026), (2, 2500))


def inputs(batch: int, dim: int, dtype=torch.float32, scale: float = 1.0) -> tuple:
    made = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    return made[0].to(dtype), made[1].to(dtype), SEED, torch.arange(batch) * 3 - 1


def test_the_stream_is_the_ops():
    assert int(Stream.LATENT) == kernel.LATENT
    mu, logvar, seed, ids = (*(torch.zeros(4, 70) for _ in range(2)), SEED, torch.arange(4))
    z, kl = kernel.forward(mu, logvar, seed, ids)
    assert torch.equal(z, stream.philox(seed, ids, 70, kernel.LATENT, 2)[:, 0])
    assert torch.equal(kl, torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(within_budget, poisoned, monkeypatch, shape, dtype):
    # the normals differ by a few ulp (test_philox.py): here everything else is compared
    own = lambda mu, seed, ids: stream.philox(seed, ids, mu.shape[1], kernel.LATENT, 2)[:, 0]  # noqa: E731
    monkeypatch.setattr(op, "_noise", own)
    for scale in (1.0, 1e-3):
        mu, logvar, seed, ids = inputs(*shape, dtype, scale)
        gz, gk = mu.flip(0) * 2, torch.linspace(-1, 2, shape[0])
        golden = op.reference(mu.double(), logvar.double(), seed, ids)
        golden += op.reference_backward(gz.double(), gk.double(), mu.double(), logvar.double(), seed, ids)
        same = op.reference(mu, logvar, seed, ids) + op.reference_backward(gz, gk, mu, logvar, seed, ids)
        got = kernel.forward(mu, logvar, seed, ids) + kernel.backward(gz, gk, mu, logvar, seed, ids)
        for index, (value, exact, rounded) in enumerate(zip(got, golden, same, strict=True)):
            if index == 1 and scale < 1:  # near the prior, exp(v) - v - 1 is rounding alone: eps for every element
                assert (value - exact).abs().max() <= shape[1] * torch.finfo(value.dtype).eps
            else:
                within_budget(value, exact, rounded)


@pytest.mark.parametrize("v", [0.0, 1e-30, 1e-7, -1e-4, 0.3, -0.9, 1.5, -20.0, -200.0, 60.0])
def test_divergence_keeps_its_gradient_everywhere(v):
    """0.5 (exp(v) - 1) to a few ulp, where the subtraction loses everything and where it does not."""
    logvar, zero, ids = torch.full((1, 5), v), torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64)
    _, got = kernel.backward(zero, torch.ones(1), zero, logvar, SEED, ids)
    torch.testing.assert_close(got, 0.5 * torch.expm1(logvar.double()).float(), rtol=1e-6, atol=0)


def test_layouts_splits_and_nan():
    mu, logvar, seed, ids = inputs(5, 37)
    whole = kernel.forward(mu, logvar, seed, ids)
    for cut in (1, 3):
        halves = [kernel.forward(mu[i], logvar[i], seed, ids[i]) for i in (slice(0, cut), slice(cut, 5))]
        assert all(torch.equal(torch.cat(parts), full) for *parts, full in zip(*halves, whole, strict=True))
    wide = torch.full((37, 12), torch.nan)
    wide[:, ::2][:, :5] = mu.T
    strided = kernel.forward(wide[:, ::2][:, :5].T, logvar, seed, ids.repeat_interleave(2)[::2])
    assert all(torch.equal(a, b) for a, b in zip(strided, whole, strict=True))
    mu[1, 2], logvar[2, 3] = torch.nan, torch.inf
    z, kl = kernel.forward(mu, logvar, seed, ids)
    assert z[1].isnan().sum() == 1 and kl[1].isnan() and not kl[2].isfinite() and kl[[0, 3, 4]].isfinite().all()
    z, kl = kernel.forward(mu[:0], logvar[:0], seed, ids[:0])
    assert z.shape == (0, 37) and kl.shape == (0,)
    assert torch.equal(kernel.forward(mu[:, :0], logvar[:, :0], seed, ids)[1], torch.zeros(5))
