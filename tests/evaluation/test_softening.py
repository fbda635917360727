"""What hardens a model keeps its values and lets gradients pass; what is no threshold stays as it is."""

import pytest
import torch
from torch.nn import functional as F

from purify_fast.evaluation import surrogates
from purify_fast.evaluation.fingerprint import fingerprint
from purify_fast.evaluation.surrogates import Softened

LEVELS = torch.linspace(0, 0.9, 10)


def in_place(z):
    z = 1 * z
    z[z.abs() < 0.2] = 0.0
    z.masked_fill_(z > 0.8, 1.0)
    z *= z >= 0.3
    return z.round_(decimals=1)


def chained(z):
    mask = (z > 0.2) & ~z.gt(0.8)
    mask |= z.unsqueeze(1)[:, 0] > 0.9
    with torch.no_grad():
        return torch.where(mask.detach(), z, 0.0)


def scattered(z, kind=torch.float32):
    winners = z.topk(3, dim=1).indices
    return z * torch.zeros_like(z, dtype=kind).scatter_(1, winners, 1)


def integers(z):
    bits = (z > 0.5).int() * 6
    bits &= (z > 0.2).int() * 3
    return z * bits


HARDENED = {
    "where": lambda z: torch.where((z - 0.5).abs() < 0.3, torch.full_like(z, 0.5), z),
    "Tensor.where": lambda z: z.where(z.ge(0.5), 0.0),
    "mask": lambda z: z * (z > 0.5),
    "k-WTA": lambda z: (z >= z.topk(3, 1).values[:, -1:]).to(z) * z,
    "scatter": scattered,
    "scatter bool": lambda z: scattered(z, torch.bool),
    "in place": in_place,
    "integers in place": integers,
    "chained": chained,
    "thermometer": lambda z: (z[..., None] > LEVELS).flatten(1).float() @ torch.ones(60, 6),
    "count": lambda z: (z[..., None] > LEVELS).sum(-1) / 10,
    "votes": lambda z: torch.stack([F.one_hot(z.argmax(1), 6), F.one_hot(z.sort(1, True)[1][:, 0], 6)]).sum(0) / 2,
    "detector": lambda z: z * (z > 0.9).any(1, keepdim=True),
    "bytes": lambda z: (z * 255).to(torch.uint8) / 255,
    "quantized": lambda z: torch.quantize_per_tensor(z, 0.1, 0, torch.qint8).dequantize(),
    "fake quantized": lambda z: torch.fake_quantize_per_tensor_affine(z, 0.1, 0, 0, 7),
    "clamp": lambda z: z.clamp(0.4, 0.6),
    "sign": lambda z: torch.sign(z - 0.5),
    "threshold": lambda z: F.threshold(z, 0.5, 0.0),
}


def with_gradient(model, x):
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    return logits, torch.autograd.grad(logits.sum() + (logits * logits).sum(), leaf, allow_unused=True)[0]


@pytest.mark.parametrize("name", HARDENED)
def test_values_stay_exact_and_gradients_pass(name):
    model, x = HARDENED[name], torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    logits, gradient = with_gradient(Softened(model, None), x)
    assert torch.allclose(logits, model(x), atol=1e-6)
    assert gradient.isfinite().all() and (gradient != 0).float().mean() >= 0.9
    # without gradients a softened copy is the same function
    soft = Softened(model, 10.0)
    assert torch.equal(with_gradient(soft, x)[0], soft(x).detach()) and with_gradient(soft, x)[1].isfinite().all()


def test_a_softened_threshold_is_smooth():
    x = torch.linspace(0.45, 0.55, 11)[None]
    values = Softened(lambda z: (z > 0.5).float(), 100.0)(x)[0]
    assert (values.diff() > 0).all() and values[0] > 0.2 and values[-1] < 0.8 and values[5] == 0.5


def stale(z):
    mask = z > 0.5
    mask[:, 0] = False
    return z * mask


def masked_out(z):
    z = z.masked_fill(z < 0.2, -torch.inf)
    z[z < 0.4] = -torch.inf
    return z.logsumexp(1, keepdim=True)


@pytest.mark.parametrize(
    "model",
    [
        torch.relu,
        lambda z: z.clamp_min(0.5),
        lambda z: F.max_pool1d(z, 2),
        lambda z: z if (z > 0.5).all() else 2 * z,
        lambda z: torch.where(z.isnan(), 0.0, z) * (torch.arange(6) < 4),
        masked_out,
        lambda z: z[z > 0.5].sum() + z,
        stale,
        lambda z: F.hardtanh_(1 * z, 0.2, 0.8),
    ],
    ids=[
        "ReLU",
        "one bound",
        "pool",
        "branch",
        "other masks",
        "minus infinity",
        "index",
        "mask written to",
        "in place",
    ],
)
def test_what_is_no_threshold_stays_as_it_is(model):
    x = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    for got, own in zip(with_gradient(Softened(model, None), x), with_gradient(model, x), strict=True):
        assert torch.equal(got, own)


def test_kept_rows_are_told_apart_by_what_softening_computes(monkeypatch):
    before = fingerprint(Softened(torch.nn.ReLU(), 10.0))
    assert before == fingerprint(Softened(torch.nn.ReLU(), 10.0))
    monkeypatch.setattr(surrogates, "REVISION", surrogates.REVISION + 1)
    assert before != fingerprint(Softened(torch.nn.ReLU(), 10.0))
