from __future__ import annotations

import pytest
import torch

from purify_fast.kernels import philox as stream
from purify_fast.kernels import sample_latent as kernel
from purify_fast.ops import Stream

SEED = torch.tensor([987654321])


def test_the_stream_is_the_ops():
    assert int(Stream.LATENT) == kernel.LATENT
    mu, logvar, seed, ids = (*(torch.zeros(4, 70) for _ in range(2)), SEED, torch.arange(4))
    z, kl = kernel.forward(mu, logvar, seed, ids)
    assert torch.equal(z, stream.philox(seed, ids, 70, kernel.LATENT, 2)[:, 0])
    assert torch.equal(kl, torch.zeros(4))


@pytest.mark.parametrize("v", [0.0, 1e-30, 1e-7, -1e-4, 0.3, -0.9, 1.5, -20.0, -200.0, 60.0])
def test_divergence_keeps_its_gradient_everywhere(v):
    """0.5 (exp(v) - 1) to a few ulp, where the subtraction loses everything and where it does not."""
    logvar, zero, ids = torch.full((1, 5), v), torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64)
    _, got = kernel.backward(zero, torch.ones(1), zero, logvar, SEED, ids)
    torch.testing.assert_close(got, 0.5 * torch.expm1(logvar.double()).float(), rtol=1e-6, atol=0)
