"""Broken defences: each is marked unreliable, and the row or probe that gives it away is named; honest ones are not."""

import numpy as np
import pytest
import torch
from digit_nets import EPS, Gated, held_out, robust, standard
from evaluating import evaluate
from reports import probed, said
from small_models import Made
from torch import nn

from purify_fast.attacks import APGD, PGD
from purify_fast.defences import NoisyEnsemble
from purify_fast.evaluation import AttackSpec, Report
from purify_fast.judge.alarms.signs import signs_of_masking

DIRECT = [APGD(steps=10), AttackSpec(APGD(loss="dlr_targeted", steps=10, n_target_classes=3), survivors_only=True)]


def around(how):
    """The standard network, which has no robustness at all, behind something."""
    return Made(how, net=standard())


class Backward(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def with_gradient(change):
    return around(lambda self, x: self.net(Backward.apply(x, change)))


def rounded(self, x):
    return self.net(x + ((x * 8).round() / 8 - x).detach())


def counting(self, x):
    """Honest for as many calls as a user tries it, then it answers what it answered to the image before."""
    self.called = getattr(self, "called", 0) + 1
    logits = self.net(x)
    return logits if self.called < 40 else logits.roll(1, 1)


def judged(model, attacks=DIRECT, n=48, **more):
    options = {"eps": EPS, "steps": 10, "eot_iter": 2, "n_eval": 2, "probes": True} | more
    return evaluate(model, *held_out(n), attacks=attacks, **options)


def verdicts(report):
    return {finding.alarm: (finding.verdict, finding.row) for finding in report.findings}


def assert_marked(report, alarm, row):
    """The number is not to be believed, and the report names what gives it away."""
    assert verdicts(report)[alarm] == ("unreliable", row)
    assert not report.headline.reliable and alarm in report.headline.doubts
    assert "unreliable" in report.to_text() and f"({row})" in " ".join(report.to_text().split())
    assert Report.from_json(report.to_json()).findings == report.findings


@pytest.mark.parametrize(("probes", "verdict"), [(None, "unreliable"), (False, "passed")])
def test_a_list_of_attacks_has_its_gradients_compared_with_small_steps(probes, verdict):
    report = judged(around(rounded), [PGD(steps=5)], probes=probes)
    health = next(finding for finding in report.findings if finding.alarm == "gradient health")
    assert (health.verdict, report.headline.reliable) == (verdict, verdict == "passed")
    assert ("cosine" in health.measured) == (probes is None)
    assert judged(standard(), [PGD(steps=5)], probes=probes).headline.reliable


def inside(self, x):
    """The classifier of a user whose images must be in [0, 1]."""
    assert x.min() >= 0 and x.max() <= 1
    return self.net(x)


def gamma(self, x):
    """Not finite outside of [0, 1]."""
    return self.net(x**1.2)


def noise_of_its_own(self, x):
    """Noise from another generator than PyTorch's global one, which no seed repeats."""
    self.generator = getattr(self, "generator", None) or torch.Generator()
    return self.net(x + 0.02 * torch.randn(x.shape, generator=self.generator))


# Other probes need noise that a seed repeats.
HONEST = [(inside, None), (inside, True), (gamma, None), (gamma, True), (noise_of_its_own, None)]


@pytest.mark.parametrize(("change", "probes"), HONEST)
def test_an_honest_model_is_not_marked_for_what_lies_outside_of_the_box_or_for_its_own_noise(change, probes):
    report = judged(around(change), [PGD(steps=3)], probes=probes)
    health = next(finding for finding in report.findings if finding.alarm == "gradient health")
    # Three steps are too few for the probes' sign of missed images.
    assert health.verdict == "passed" and (report.headline.reliable or probes)
    assert ("cosine" in health.measured) == (change is not noise_of_its_own)


@pytest.mark.slow
@pytest.mark.parametrize("make", [robust, lambda: NoisyEnsemble(robust(), 0.03, samples=4)], ids=["net", "noisy"])
def test_an_honest_model_passes(make):
    report = judged(make(), n=32)
    found = {alarm: verdict for alarm, (verdict, _) in verdicts(report).items()}
    assert "unreliable" not in found.values(), report.findings
    assert report.row("worst").reliable and "doubts" not in report.row("worst").settings
    assert len(found) == (8 if report.curves.get("EOT draws") else 7)
    # Of a random model, the short attacks compare numbers of draws, and of another model numbers of steps.
    assert list(report.curves) == ["steps" if report.row("clean").deterministic else "EOT draws"]


WINS = [("passed", 64, 3.0), ("noted", 8, 2.4), ("noted", 64, 9.0), ("unreliable", 8, 3.2), ("unreliable", 64, 9.8)]


@pytest.mark.parametrize(("verdict", "n", "images"), WINS)
def test_how_many_images_more_draws_must_win(verdict, n, images):
    draws = [(1.0, 0.25 + images / n), (4.0, 0.25), (16.0, 0.25)]
    assert said([], probed(n, eot=draws))["noise and seeds"].verdict == verdict


@pytest.mark.parametrize("images, verdict", [(1, "passed"), (3, "noted"), (30, "noted")])
def test_a_class_that_varies_is_noted(images, verdict):
    """The number counts every draw: a model that changes its mind does not hide an image from the attacks."""
    draws = [(1.0, 0.5), (16.0, 0.5)]
    assert said([], probed(eot=draws, varying=images / 64))["noise and seeds"].verdict == verdict


def test_a_model_that_answers_otherwise_while_gradients_are_recorded_is_noticed():
    cheat = around(lambda self, x: self.net(x).roll(1, 1) if x.requires_grad else self.net(x))
    verdict, row = verdicts(judged(cheat))["same answer again"]
    assert (verdict, row) == ("unreliable", "probe: the images with gradients recorded")


def rounds_to(levels):
    """Rounding with the identity's gradient: a step of a few levels, which gradients do not see."""
    return around(lambda self, x: self.net(x + ((x * levels).round() / levels - x).detach()))


def by_batch(self, x):
    return self.net(x) if len(x) > 9 else self.net((x * 4).round() / 4).roll(1, 1)


def reseeds(self, x):
    torch.manual_seed(0)
    return self.net((x + 0.3 * torch.randn_like(x[:1])).clamp(0, 1))


def other_while_recorded(self, x):
    """The same classes of clean images, and gradients that lead nowhere."""
    logits = self.net(x)
    return logits.detach() + 1e-3 * self.net(x.flip(-1)) if torch.is_grad_enabled() else logits


def wrong_off_the_grid(self, x):
    """Right gradients of images as they come from a file, wrong ones of all others."""
    clean = ((x * 16 - (x * 16).round()).abs() < 1e-3).flatten(1).all(1)[:, None, None, None]
    return self.net(Backward.apply(x, lambda g: torch.where(clean, g, g.roll(1, 0).flip(-1))))


DIFFERENCES = ("gradient health", "probe: small steps in random directions")
#: Where signs are found before the attacks, the gradients of parts are followed by rows of the report.
TRANSFER = ("missed images", "APGD-T by the gradients of standard alone")


NO_MARGIN = ("gradient health", "APGD-10 margin")
NOTICED = {
    "NaN": (lambda: with_gradient(lambda g: g * torch.nan), *NO_MARGIN),
    "counts": (lambda: around(counting), "same answer again", "probe: the clean images again, after all attacks"),
    "gate 100": (lambda: Gated(slope=100.0), *TRANSFER),
    "2 levels": (lambda: rounds_to(2), *DIFFERENCES),
    "255 levels": (lambda: around(lambda self, x: self.net((x * 255).round() / 255)), *NO_MARGIN),
    "batch": (lambda: around(by_batch), "batch size", "probe: the same images alone and in a batch"),
    "seed": (lambda: around(reseeds), "noise and seeds", "probe: the generator's state after two seeds"),
    "gradient mode": (lambda: around(other_while_recorded), *DIFFERENCES),
    "off the grid": (lambda: around(wrong_off_the_grid), *DIFFERENCES),
    "noisy gradients": (lambda: with_gradient(lambda g: g + 3 * g.std() * torch.randn_like(g)), *DIFFERENCES),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "alarm", "row"), NOTICED.values(), ids=NOTICED)
def test_the_fast_protocol_notices_it_too(model, alarm, row):
    n = 100 if alarm == TRANSFER[0] else 48
    assert_marked(evaluate(model(), *held_out(n), eps=EPS, protocol="fast", steps=30), alarm, row)


def test_the_points_of_probes_count_by_draws_of_their_own():
    """The headline counts what fell to a probe, at the draws that judge its points."""
    report = judged(around(lambda self, x: (z := self.net(x)) + 4 * torch.randn_like(z)))
    assert verdicts(report)["noise and seeds"] == ("noted", "probe: gradients over 16 draws")
    worst, attacked = report.row("worst"), [each for each in report.rows if each.is_attack]
    assert worst.fell_to_probes > 0
    # Other draws judge the points than those that chose them, so the mean may be a little above that of one attack.
    assert worst.mean < min(each.mean for each in attacked) + 0.03
    assert all((worst.wrong >= each.wrong).all() for each in attacked)


def test_a_large_scale_of_the_logits_hides_nothing():
    """The cross-entropy of float32 would have no gradient then; computed exactly, it has the right one."""
    attacks = [APGD(steps=25), APGD(loss="dlr_targeted", steps=30)]
    models = standard(), around(lambda self, x: 1e4 * self.net(x))
    plain, large = (judged(model, attacks, probes=False) for model in models)
    assert large.headline.accuracy <= plain.headline.accuracy + 0.03 and large.headline.reliable
    assert verdicts(large)["gradient health"] == ("passed", "")
    rows = [[row.accuracy for row in report.rows if row.is_attack] for report in (plain, large)]
    assert np.abs(np.subtract(*rows)).max() < 0.07, rows


def test_a_model_that_guesses_is_told_beside_the_number():
    report = judged(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), [PGD(steps=2)], probes=False)
    assert verdicts(report)["better than guessing"] == ("noted", "clean")
    assert "a guess among 10 classes is right for 10.0 %" in " ".join(report.to_text().split())
    assert verdicts(judged(standard(), [PGD(steps=2)], probes=False))["better than guessing"][0] == "passed"


def steps(self, x):
    """The network behind a step without a gradient."""
    return self.net((x * 4).round() / 4)


def searched(model, n=48, **options):
    return evaluate(model, *held_out(n), **{"eps": EPS, "protocol": "fast", "steps": 30} | options)


def searched_early(report):
    """The attacks that stop early or leave images out."""
    names = ("until", "nearest")
    return [row.attack for row in report.rows if any(row.settings.get(name) for name in names)]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["fast", "standard"])
def test_where_gradients_are_masked_searches_run_to_their_end_and_surrogates_join(protocol):
    report = searched(around(steps), n=24, protocol=protocol)
    (note,) = [note for note in report.notes if "masked gradients" in note]
    assert not searched_early(report) and not any(row.settings.get("give_up") for row in report.rows)
    joined = [row for row in report.rows if "by the gradients of" in row.attack]
    assert joined and f"{len(joined)} rows" in note
    assert min(row.accuracy for row in joined) == report.headline.accuracy < report.row("APGD-10 margin").accuracy
    # a list of attacks is run as it is, and without probes nothing is known before
    assert not any("masked" in note for note in searched(around(steps), n=24, protocol=protocol, probes=False).notes)
    own = searched(around(steps), n=24, protocol=None, attacks=[PGD(steps=2)], probes=True)
    assert own.attacks == ["clean", "PGD-2 ce", "worst"] and not any("masked" in note for note in own.notes)


@pytest.mark.slow
def test_an_honest_model_is_attacked_as_without_the_signs():
    alone, asked = (searched(robust(), n=40, protocol="standard", probes=probes) for probes in (False, True))
    assert alone.attacks == asked.attacks and searched_early(asked)
    assert not any("masked" in note for note in asked.notes)
    for one, other in zip(alone.rows, asked.rows, strict=True):
        assert one.settings == other.settings and not other.fell_to_probes
        assert (one.robust == other.robust).all() and one.health == other.health
        if one.margins is not None:
            assert np.array_equal(one.margins, other.margins, equal_nan=True)


SIGNS = [
    ({}, False),
    ({"cosine": "zero gradient"}, True),
    ({"cosine": 0.5}, True),
    ({"cosine": 0.7}, False),
    ({"without_gradient": 0.03}, False),
    ({"without_gradient": 0.2}, True),
    ({"copies": {"one": [1] * 2 + [0] * 62, "two": [0] * 62 + [1] * 2}}, False),
    ({"copies": {"one": [1] * 4 + [0] * 60, "two": [0] * 60 + [1] * 4}}, True),
]


@pytest.mark.parametrize("measured, fires", SIGNS)
def test_how_much_is_a_sign(measured, fires):
    assert bool(signs_of_masking(probed(**measured), False)) is fires


def test_a_random_model_loses_images_to_many_attacks_by_luck():
    several = {name: [1] * 3 + [0] * 61 for name in ("one", "two", "three")}
    assert signs_of_masking(probed(copies=several), False) and not signs_of_masking(probed(copies=several), True)
    assert signs_of_masking(probed(copies={"one": [1] * 8 + [0] * 56}), True)
