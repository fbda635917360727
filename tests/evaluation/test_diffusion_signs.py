"""Purifiers by diffusion that only seem robust, because their gradients are missing or wrong, are flagged."""

import functools

import pytest
import torch
from digit_nets import EPS, digits, standard
from evaluating import evaluate
from torch import nn

from purify_fast.attacks import APGD, PGD
from purify_fast.attacks.base import ThreatModel
from purify_fast.evaluation import AttackSpec
from purify_fast.evaluation.alarms import probes
from purify_fast.evaluation.surrogates.usable import surrogates

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, NOISE = 4, 0.25


@functools.cache
def denoiser():
    """A small network that predicts the noise of digits, trained for a moment."""
    x, _, _, _ = digits()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.Tanh(), nn.Conv2d(24, 1, 3, padding=1))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(200):
            images = x[torch.randint(len(x), (64,))]
            noise = NOISE * torch.rand(64, 1, 1, 1) * torch.randn_like(images)
            optimizer.zero_grad()
            (net(images + noise) - noise).square().mean().backward()
            optimizer.step()
    return net.requires_grad_(False)


def step(x, z):
    """An estimate of the image, with a quarter of the noise again."""
    return x - 0.5 * denoiser()(x) + 0.05 * z


class Purifier(nn.Module):
    """Somebody's own loop around a classifier."""

    def __init__(self):
        super().__init__()
        self.denoiser, self.classifier = denoiser(), standard()

    def draws(self, x):
        return torch.randn(STEPS + 1, *x.shape)

    def purify(self, x):
        start, *later = self.draws(x)
        return self.loop(x + NOISE * start, later)

    def loop(self, x, later):
        for z in later:
            x = step(x, z)
        return x

    def forward(self, x):
        return self.classifier(self.purify(x))


class WithoutGradients(Purifier):
    def loop(self, x, later):
        with torch.no_grad():
            return super().loop(x, later)


class _WrongAdjoint(torch.autograd.Function):
    """Goes back through states that it solves for with other noise than that of the way forward."""

    @staticmethod
    def forward(ctx, x, *later):
        for z in later:
            x = step(x, z)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        for _ in range(STEPS):
            with torch.enable_grad():
                y = (y + NOISE * torch.randn_like(y)).detach().requires_grad_()
                ahead = -4 * denoiser()(y)
            (back,) = torch.autograd.grad(ahead, y, grad)
            grad = grad + back
        return grad, *[None] * STEPS


class Adjoint(Purifier):
    def loop(self, x, later):
        return _WrongAdjoint.apply(x, *later)


class Reseeded(Purifier):
    """Its noise is always the same."""

    def draws(self, x):
        torch.manual_seed(3)
        return super().draws(x)


class SeededByTheImages(Purifier):
    """The noise is another one as soon as a pixel is, and the generators are left alone."""

    def draws(self, x):
        with torch.random.fork_rng([]):
            torch.manual_seed(int(x.detach().double().sum() * 1e9) % 2**31)
            return super().draws(x)


@pytest.fixture(scope="module", autouse=True)
def short_probes():
    """The same questions, with fewer steps and settings."""
    fewer = {"STEPS": 6, "ITERATIONS": (1, 3), "DRAWS": (1, 4), "TARGETS": 1, "JUDGES": 3}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fewer.items():
            patch.setattr(probes, name, value)
        yield


@functools.cache
def verdicts(kind):
    """The findings about a purifier by sign, and whether its headline may be believed."""
    _, _, x, y = digits()
    options = {"attacks": [PGD(steps=5)], "probes": True, "eot_iter": 1, "n_eval": 2, "progress": False}
    report = evaluate(kind(), x[:24], y[:24], eps=EPS, **options)
    return {finding.alarm: finding for finding in report.findings}, report.headline.reliable


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sign", "words"),
    [
        (WithoutGradients, "gradient health", "attack along the model's own gradients could not use them"),
        (Adjoint, "gradient health", "cosine"),
        (Reseeded, "noise and seeds", "the model sets the seed of torch's generator itself"),
        (SeededByTheImages, "gradient health", "cosine"),
    ],
)
def test_a_purifier_that_misleads_attacks_is_flagged(kind, sign, words):
    found, reliable = verdicts(kind)
    assert found[sign].verdict == "unreliable" and words in found[sign].measured and not reliable
    # the same purifier without the fault is not
    assert verdicts(Purifier)[0][sign].verdict != "unreliable"


def test_what_was_not_asked_for_want_of_a_gradient_says_so():
    """Gradient health has raised the alarm; what attacks along no gradient did not find speaks for nothing."""
    found, _ = verdicts(WithoutGradients)
    assert "of the model itself" not in found["missed images"].measured
    assert "no grad_fn: does forward use torch.no_grad()" in found["gradient health"].advice


def test_what_has_no_gradients_falls_to_bpda():
    """The surrogate replaces the gradient of any purifier, also of one that is no class of this package."""
    _, _, x, y = digits()
    model = WithoutGradients()
    straight = next(each for name, each in surrogates(model, x[:8], 10, ThreatModel("linf", EPS)) if "identity" in name)
    spec = AttackSpec(APGD(loss="margin", steps=10), gradients_from=straight)
    report = evaluate(
        model, x[:24], y[:24], eps=EPS, attacks=[PGD(steps=5), spec], n_eval=2, eot_iter=1, progress=False
    )
    blind, seeing = report.rows[1:3]
    assert blind.accuracy > 0.5 and seeing.accuracy < 0.5 * blind.accuracy
