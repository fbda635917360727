"""A softened threshold keeps its values and lets gradients pass; other functions stay as they are."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from purify_fast.judge.surrogates.copies import Softened

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


BOOK = torch.linspace(0.05, 0.95, 24).view(4, 6).T.contiguous()
TABLE = nn.Embedding.from_pretrained(LEVELS[:8, None].square())


class Rounding(torch.autograd.Function):
    """Its gradient is zero."""

    @staticmethod
    def forward(ctx, z):
        return (7 * z).round() / 7

    @staticmethod
    def backward(ctx, grad):
        return 0 * grad


class NoBackward(Rounding):
    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class NoGradient(Rounding):
    @staticmethod
    def backward(ctx, grad):
        return None


def steps(z):
    return (7 * z).long()


def nearest(z):
    """The index of the nearest of the levels."""
    return (z[..., None] - LEVELS).abs().argmin(-1)


def coded(z, look):
    """Vector quantization: pairs of numbers become the nearest rows of a codebook."""
    return look(torch.cdist(z.view(-1, 2), BOOK[:, :2])).view(z.shape)


def in_one_hot(distances):
    ids = torch.argmin(distances, dim=1).unsqueeze(1)
    return torch.zeros(len(ids), 6).scatter_(1, ids, 1) @ BOOK[:, :2]


def floor_in_place(z):
    z = 4 * z
    z //= 1
    return z.div_(4)


#: Each has a gradient of zero, or none, by itself.
IN_STEPS = {
    "argmin": lambda z: nearest(z) / 9,
    "argmin, one_hot": lambda z: F.one_hot(nearest(z), 10).float() @ LEVELS,
    "argmin == arange": lambda z: (nearest(z)[..., None] == torch.arange(10)).float() @ LEVELS,
    "min": lambda z: LEVELS[(z[..., None] - LEVELS).abs().min(-1)[1]],
    "codebook[argmin]": lambda z: coded(z, lambda d: BOOK[:, :2][d.argmin(1), :]),
    "codebook by embedding": lambda z: coded(z, lambda d: F.embedding(d.argmin(-1), BOOK[:, :2])),
    "codebook by index_select": lambda z: coded(z, lambda d: BOOK[:, :2].index_select(0, d.argmin(1))),
    "codebook by scatter": lambda z: coded(z, in_one_hot),
    "two nearest of a codebook": lambda z: coded(z, lambda d: BOOK[:, :2][d.topk(2, largest=False)[1]].mean(1)),
    "bucketize": lambda z: torch.bucketize(z, LEVELS) / 10,
    "searchsorted": lambda z: torch.searchsorted(LEVELS, z) / 10,
    "take": lambda z: LEVELS.take(steps(z)),
    "==": lambda z: (steps(z) == 3).float(),
    "!=": lambda z: z * (z != 0.5).float() - z,
    "one_hot of steps": lambda z: F.one_hot(steps(z), 8).float() @ LEVELS[:8],
    "embedding of steps": lambda z: TABLE(steps(z)).squeeze(-1),
    "topk of the smallest": lambda z: torch.zeros_like(z).scatter(1, z.topk(3, largest=False)[1], 1.0),
    "div": lambda z: torch.div(z, 0.25, rounding_mode="floor"),
    "//": lambda z: (4 * z) // 1,
    "// in place": floor_in_place,
    "floor_divide": lambda z: torch.floor_divide(z, 0.25),
    "remainder": lambda z: z - z % 0.25,
    "fmod": lambda z: z - torch.fmod(z, 0.25),
    "frac": lambda z: z - torch.frac(4 * z) / 4,
    "integers //": lambda z: ((255 * z).long() // 32).float(),
    "integers >>": lambda z: ((255 * z).to(torch.uint8) >> 5).float(),
    "integers &": lambda z: ((255 * z).to(torch.uint8) & 0xE0) / 255,
    "integers clamped": lambda z: (255 * z).int().clamp(50, 200).float(),
    "data": lambda z: 2 * z.data,
    "function of zero gradient": lambda z: 2 * Rounding.apply(z),
    "function without a backward": NoBackward.apply,
    "function without a gradient": lambda z: NoGradient.apply(z).flatten(1),
}


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


X = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))


def with_gradient(model):
    leaf = X.clone().requires_grad_()
    logits = model(leaf)
    return logits, torch.autograd.grad(logits.sum() + (logits * logits).sum(), leaf, allow_unused=True)[0]


@pytest.mark.parametrize("name", HARDENED)
def test_values_stay_exact_and_gradients_pass(name):
    model = HARDENED[name]
    logits, gradient = with_gradient(Softened(model, None))
    assert torch.allclose(logits, model(X), atol=1e-6)
    assert gradient.isfinite().all() and (gradient != 0).float().mean() >= 0.9
    # without gradients a softened copy is the same function
    soft = Softened(model, 10.0)
    assert torch.equal(with_gradient(soft)[0], soft(X).detach()) and with_gradient(soft)[1].isfinite().all()


@pytest.mark.parametrize("temperature", [None, 10.0])
@pytest.mark.parametrize("name", IN_STEPS)
def test_gradients_pass_what_goes_in_steps(name, temperature):
    model = IN_STEPS[name]
    logits, gradient = with_gradient(Softened(model, temperature))
    # of a number that is equal the distance has no slope
    share = (gradient != 0).float().mean()
    assert gradient.isfinite().all() and share >= (0.6 if name == "==" else 0.9)
    if temperature is None:
        assert torch.allclose(logits, model(X), atol=1e-6)
    own = None
    # PyTorch has no derivative of a floor division
    with contextlib.suppress(RuntimeError, NotImplementedError):
        own = with_gradient(model)[1]
    assert own is None or not own.any()


def test_a_wrong_gradient_is_not_followed():
    class Against(Rounding):
        @staticmethod
        def backward(ctx, grad):
            return -grad

    class Checked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return 3 * z

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad

    want = with_gradient(Softened(lambda z: (7 * z).round() / 7, None))[1]
    assert torch.allclose(with_gradient(Softened(Against.apply, None))[1], want)
    # one copy trusts no such function, the others those that have a gradient
    assert torch.equal(with_gradient(Softened(Checked.apply, 10.0))[1], with_gradient(Checked.apply)[1])
    # some images of a batch alone have none
    half = with_gradient(Softened(lambda z: torch.cat([Rounding.apply(z[:2]), Checked.apply(z[2:])]), 10.0))[1]
    assert torch.equal(half[2:], with_gradient(Checked.apply)[1][2:]) and (half[:2] != 0).all()


def test_hardtanh_is_softened_in_its_range():
    for function in (F.hardtanh, F.hardtanh_):

        def model(z, function=function):
            return function(1 * z, 0.4, 0.6)

        straight, soft = (with_gradient(Softened(model, t))[1] for t in (None, 10.0))
        assert (straight != 0).float().mean() < 0.5 and (soft != 0).all() and soft.norm() > straight.norm()


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


STAYS = {
    "ReLU": torch.relu,
    "one bound": lambda z: z.clamp_min(0.5),
    "pool": lambda z: F.max_pool1d(z, 2),
    "branch": lambda z: z if (z > 0.5).all() else 2 * z,
    "other masks": lambda z: torch.where(z.isnan(), 0.0, z) * (torch.arange(6) < 4),
    "minus infinity": masked_out,
    "index": lambda z: z[z > 0.5].sum() + z,
    "mask written to": stale,
    "in place": lambda z: F.hardtanh_(1 * z, 0.2, 0.8),
}


@pytest.mark.parametrize("model", STAYS.values(), ids=STAYS)
def test_what_is_no_threshold_stays_as_it_is(model):
    for got, own in zip(with_gradient(Softened(model, None)), with_gradient(model), strict=True):
        assert torch.equal(got, own)
