import math
from importlib import import_module

import pytest
import torch
from op_cases import cases

from purify_fast.ops import Stream, philox, sample_latent

op = import_module("purify_fast.ops.sample_latent")
SHAPES = ((1, 1), (3, 64), (5, 37), (2, 1026), (0, 8), (4, 0))
SEED = torch.tensor([987654321])


def inputs(batch: int, dim: int, dtype=torch.float32, seed: int = 0) -> tuple:
    made = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made[0].to(dtype), made[1].to(dtype), SEED, torch.arange(batch) * 3 + seed


def test_published_divergence(backend):
    mu, logvar = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, math.log(4.0)], [0.0, 0.0]])
    _, kl = sample_latent(mu, logvar, SEED, torch.arange(2))
    torch.testing.assert_close(kl, torch.tensor([1.306853, 0.0]), rtol=0, atol=1e-6)


def test_the_sample_is_the_named_noise(backend):
    mu, logvar, seed, ids = inputs(6, 64)
    noise = philox(seed, ids, 64, stream=Stream.LATENT, distribution="normal")[:, 0]
    z, _ = sample_latent(mu, logvar, seed, ids)
    torch.testing.assert_close(z, mu + noise * (0.5 * logvar).exp())
    standard, _ = sample_latent(torch.zeros_like(mu), torch.zeros_like(mu), seed, ids)
    assert torch.equal(standard, noise)
    other, _ = sample_latent(mu, logvar, seed + 1, ids)
    assert not torch.equal(other, z)


@pytest.mark.parametrize(("shape", "dtype"), cases(SHAPES, (5, 37), (2, 1026)), ids=str)
def test_values_and_gradients(backend, within_budget, poisoned, monkeypatch, shape, dtype):
    # normals differ by a few ulp between backends (test_philox.py): here everything else is compared
    own = lambda mu, *key: philox(*key, mu.shape[1], stream=Stream.LATENT, distribution="normal")[:, 0]  # noqa: E731
    monkeypatch.setattr(op, "_noise", own)
    mu, logvar, seed, ids = inputs(*shape, dtype)
    gz = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    gk = torch.linspace(-1, 2, shape[0], dtype=torch.promote_types(dtype, torch.float32))
    leaves = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    z, kl = sample_latent(*leaves, seed, ids)
    golden = op.reference(mu.double(), logvar.double(), seed, ids)
    same = op.reference(mu, logvar, seed, ids)
    for got, exact, rounded in zip((z, kl), golden, same, strict=True):
        within_budget(got, exact, rounded)
    got = torch.autograd.grad((z, kl), leaves, (gz, gk))
    golden = op.reference_backward(gz.double(), gk.double(), mu.double(), logvar.double(), seed, ids)
    same = op.reference_backward(gz, gk, mu, logvar, seed, ids)
    for value, exact, rounded in zip(got, golden, same, strict=True):
        if backend == "reference":  # autograd's rounding, not the reference backward's
            eps = 8 * torch.finfo(dtype).eps
            atol = eps * exact.abs().amax().item() if exact.numel() else 0.0
            torch.testing.assert_close(value.double(), exact, rtol=eps, atol=atol)
        else:
            within_budget(value, exact, rounded)


def test_divergence_near_the_prior_keeps_its_gradient(backend):
    """exp(v) - 1 loses everything at a small v; expm1 does not."""
    logvar = torch.full((1, 4), 1e-6, requires_grad=True)
    _, kl = sample_latent(torch.zeros(1, 4), logvar, SEED, torch.zeros(1, dtype=torch.int64))
    if backend != "reference":  # autograd's derivative of exp(v) - v - 1 is the subtraction
        torch.testing.assert_close(torch.autograd.grad(kl.sum(), logvar)[0], torch.full((1, 4), 5e-7))


def test_one_output_alone_has_a_gradient(backend):
    mu, logvar, seed, ids = inputs(3, 8)
    mu.requires_grad_()
    z, kl = sample_latent(mu, logvar, seed, ids)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), mu, retain_graph=True)[0], torch.ones_like(mu))
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), mu)[0], mu.detach())


def test_non_finite_parameters_are_not_hidden(backend):
    mu, logvar, seed, ids = inputs(4, 8)
    mu[1, 2], logvar[2, 3], logvar[3, 0] = torch.nan, torch.nan, torch.inf
    z, kl = sample_latent(mu, logvar, seed, ids)
    assert z[1].isnan().sum() == 1 and z[2].isnan().sum() == 1 and not z[3, 0].isfinite()
    assert kl[1].isnan() and kl[2].isnan() and not kl[3].isfinite() and kl[0].isfinite()
