"""The losses that attacks raise, compared with float64, and attacks on models that are sure."""

import itertools

import pytest
import torch
from direct import direct
from torch import nn
from torch.nn import functional as F

from purify_fast.attacks import GradientHealth, JudgeContext, OriginalAutoAttack, apgd, fgsm, frozen, pgd
from purify_fast.ops import attack_loss, use_backend
from purify_fast.training import Batch, TrainingAttack

#: Below this loss the exact form replaces the usual one.
SURE = {torch.float32: 2**-8, torch.float64: 2.0**-37, torch.bfloat16: 2**-8, torch.float16: 2**-8}


def sure_logits(classes, dtype=torch.float32, margins=(0, 200)):
    """Random logits of 802 images, whose true class is ahead of the second by margins in even steps."""
    margin, g = torch.linspace(*margins, 802), torch.Generator().manual_seed(classes)
    logits, y = 3 * torch.randn(802, classes, generator=g), torch.randint(0, classes, (802,), generator=g)
    rows = torch.arange(802)
    logits[rows, y] = -torch.inf
    logits[rows, y] = logits.amax(1) + margin
    return logits.to(dtype), y


def with_gradient(kind, logits, y, targets=None):
    gradient, loss, _ = attack_loss(logits, y, kind, targets=targets)
    return loss, gradient


def usual(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def usual_with_gradient(logits, y):
    leaf = logits.detach().requires_grad_()
    value = usual(leaf, y)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def in_float64(logits, y):
    """The loss and its gradient, and the logsumexp of the other classes minus the true logit, in float64."""
    leaf = logits.double().requires_grad_()
    z = leaf.scatter(1, y[:, None], -torch.inf).logsumexp(1) - leaf.gather(1, y[:, None])[:, 0]
    value = F.softplus(z)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0], z.detach()


def relative(found, wanted):
    return (found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize(
    ("dtype", "lowest", "rounding"),
    [
        (torch.float32, 61, 1e-4),
        # the gradient is rounded to the dtype of the logits
        (torch.bfloat16, 61, 4e-3),
        (torch.float16, 6.8, 2e-3),
        (torch.float64, 495, 1e-4),
    ],
)
def test_the_cross_entropy_of_a_sure_model_is_that_of_float64(classes, dtype, lowest, rounding):
    logits, y = sure_logits(classes, dtype)
    loss, gradient = with_gradient("ce", logits, y)
    value, exact, z = in_float64(logits, y)
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and gradient.dtype == dtype
    seen = z > -lowest
    # The usual formula adds the classes up to a number near 1, whose distance to 1 is the loss, at least SURE. Each
    # addition errs by at most half an eps. The order of the additions depends on the processor's instructions.
    summed = usual(logits.to(loss.dtype), y) >= SURE[loss.dtype]
    sums = summed * classes * torch.finfo(loss.dtype).eps / 2 / SURE[loss.dtype]
    assert seen.sum() > 5 and ((loss.double() / value - 1).abs() < min(rounding, 1e-4) + sums)[seen].all()
    assert (relative(gradient, exact) < rounding + sums)[seen].all()
    # further down the size stays, so that no gradient vanishes, and the direction is right
    units = (each / each.norm(dim=1, keepdim=True) for each in (gradient.double(), exact))
    assert (relative(*units) < rounding + sums).all()
    assert gradient.double().norm(dim=1).min() > torch.finfo(dtype).tiny ** 0.8
    # a smaller margin has a higher loss, everywhere
    rises = loss[z.argsort()].diff()
    assert (rises >= 0).all() and (rises > 0).float().mean() > (0.99 if dtype == torch.float32 else 0.3)


def test_infinite_logits_and_nan_are_as_in_the_usual_formula():
    values = (-torch.inf, -1e38, -100.0, 0.0, 3.0, 100.0, 1e38, torch.inf, torch.nan)
    logits = torch.tensor(list(itertools.product(values, repeat=3)))
    y = torch.zeros(len(logits), dtype=torch.int64)
    with use_backend("reference"):
        (loss, gradient), (before, slope) = with_gradient("ce", logits, y), usual_with_gradient(logits, y)
    # the only exact losses: the true class is far ahead of another finite class
    exact = logits[:, 0].isfinite() & (logits[:, 1:].amax(1).isfinite()) & (before == 0)
    assert 20 < exact.sum() < 100 and (loss[exact] < 0).all() and gradient[exact].any(1).all()
    assert torch.equal(loss[~exact].nan_to_num(7.0), before[~exact].nan_to_num(7.0))
    assert torch.equal(gradient[~exact].nan_to_num(7.0), slope[~exact].nan_to_num(7.0))
    assert loss[exact].isfinite().all() and gradient[exact].isfinite().all()
    assert before.isnan().sum() > 200 and gradient.isnan().any(1).sum() > 200


class Sure(nn.Module):
    """A linear classifier of four classes, of which the first is ahead by about a margin on gray images."""

    def __init__(self, margin):
        super().__init__()
        weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(3))
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.tensor([margin, 0.0, 0.0, 0.0]) - 0.5 * weight.sum(1))

    def forward(self, x):
        return F.linear(x.flatten(1), self.weight, self.bias)


ATTACKS = {
    "FGSM": lambda model, x, y: fgsm(model, x, y, eps=0.02),
    "PGD": lambda model, x, y: pgd(model, x, y, eps=0.02, steps=3, random_start=False, keep_best=True),
    "PGD, l2": lambda model, x, y: pgd(model, x, y, eps=0.02, steps=3, norm="l2", random_start=False),
    "APGD": lambda model, x, y: apgd(model, x, y, eps=0.02, steps=5),
    "training": lambda model, x, y: TrainingAttack(eps=0.02, steps=2, random_start=False).run(
        model, Batch(x, y, torch.arange(len(x)), 0)
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("margin", [20.0, 50.0, 150.0])
def test_an_attack_on_a_sure_model_finds_what_it_finds_in_float64(name, margin):
    x = 0.5 + 0.01 * torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    y = torch.zeros(6, dtype=torch.int64)
    found, wanted = (ATTACKS[name](Sure(margin).to(dtype), x.to(dtype), y) for dtype in (torch.float32, torch.float64))
    assert torch.allclose(found.double(), wanted, atol=1e-5) and not torch.equal(found, x)
    if name == "FGSM":
        # with the formula of float32 alone, the steps follow the wrong classes but not the true class
        leaf = x.clone().requires_grad_()
        blind = torch.autograd.grad(usual(Sure(margin)(leaf), y).sum(), leaf)[0].sign()
        assert (blind == (found - x).sign()).float().mean() < 0.9


def test_gradients_of_the_packages_autoattack_are_counted_by_its_own_formula():
    """AutoAttack's own cross-entropy has no gradient on a model that is sure, so its result stays unreliable."""
    pytest.importorskip("pyautoattack")
    x = 0.5 + 0.01 * torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    y, model = torch.zeros(5, dtype=torch.int64), Sure(150.0)
    for batch_size in (None, 2):
        context = JudgeContext(eps=0.02, num_classes=4, batch_size=batch_size, counts_health=True)
        health = OriginalAutoAttack(steps=2, n_queries=2).search(model, x, y, context).health
        assert health.zero == 1 and not health.reliable, batch_size
    own = GradientHealth()
    with frozen(model):
        direct(apgd, model, x, y, eps=0.02, steps=2, health=own)
    assert own.zero == 0 and own.reliable
