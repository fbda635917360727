import math

import pytest
import torch

from purify_fast.ops import Stream, philox, sample_latent

pytestmark = pytest.mark.interpreter

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
