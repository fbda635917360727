"""The accuracy over the radius: it falls, and is that of a linear model, of which it is known."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from evaluating import evaluate
from small_models import labelled

from purify_fast.attacks import APGD, PGD, AttackResult, StAdv, apgd
from purify_fast.evaluation import AttackSpec, Report, merge
from purify_fast.evaluation.request.subject import Subject

RADII = (0.055, 0.06, 0.065, 0.08, 0.085)


@pytest.fixture(scope="module")
def linear():
    """A linear model, images away from black and white, their labels, and how far each is from its border in L-inf."""
    model, x, y = labelled(80, classes=6, low=0.4)
    weight, logits = model[1].weight.detach(), model(x).detach()
    apart = (weight[y][:, None] - weight).abs().sum(2)
    distance = (logits.amax(1, keepdim=True) - logits) / apart
    return model, x, y, distance.scatter(1, y[:, None], torch.inf).amin(1)


def judged(linear, **options):
    specs = [AttackSpec(APGD(loss=loss, steps=10), survivors_only=True) for loss in ("ce", "margin_targeted")]
    options = {"eps": 0.07, "attacks": specs, "curve": [0.07, *RADII[::-1]]} | options
    return evaluate(*linear[:3], **options)


@pytest.mark.slow
def test_the_curve_is_that_of_the_model_and_is_kept(linear, tmp_path):
    report = judged(linear, out=tmp_path)
    assert [eps for eps, _ in report.curve] == sorted([0.0, 0.07, *RADII])
    accuracies = [accuracy for _, accuracy in report.curve]
    assert accuracies == [pytest.approx((linear[3] > eps).float().mean()) for eps, _ in report.curve]
    assert 1 == accuracies[0] > accuracies[1] > accuracies[-1] and report.row("worst, L-inf 0.06").n == 80
    kept = judged(linear, out=tmp_path)
    assert [row.seconds for row in kept.rows] == [row.seconds for row in report.rows]
    parts = judged(linear, batch_size=4)
    assert kept.curve == parts.curve == Report.from_json(report.to_json()).curve == report.curve
    assert report.headline.attack == "worst" and "Accuracy over the radius" in report.to_html()
    with pytest.raises(ValueError, match="curve needs one model that was evaluated with a curve, got 2"):
        merge([report, judged(linear, name="other")]).curve  # noqa: B018


def test_a_search_begins_at_the_points_of_the_smaller_ball():
    def by_brightness(images):
        # without a gradient, so that a search stays where it begins
        side = (images.mean((1, 2, 3)) - 0.55).sign()
        return torch.stack([-side, side], 1)

    x, y = torch.full((4, 3, 4, 4), 0.5), torch.zeros(4, dtype=torch.int64)
    assert not by_brightness(apgd(by_brightness, x, y, eps=0.1, steps=2)).argmax(1).any()
    # beyond the ball, to which it is projected
    assert torch.allclose(apgd(by_brightness, x, y, eps=0.1, steps=2, begin=x + 0.3), x + 0.1)


@dataclass(frozen=True, kw_only=True)
class Noting(PGD):
    """Moves every image by the radius, and notes where it would have begun."""

    begun: ClassVar[list] = []

    def search(self, target, x, y, context):
        self.begun.append(context.begin)
        return AttackResult((x + self.threat_model(context).eps).clamp(0, 1))


def test_a_radius_begins_at_the_points_of_the_one_before_however_sure_the_model_is(monkeypatch):
    """Infinite leads and others; and of the images that have fallen nothing is asked."""

    def sure(images):
        wrong = images.mean((1, 2, 3), keepdim=False) > 0.7
        logits = torch.stack([torch.where(wrong, -torch.inf, torch.inf), torch.zeros(len(images))], 1)
        return torch.where((images[:, 0, 0, 0] > 0.9)[:, None], torch.tensor([1.0, 0.0]), logits)

    x, y, counts, judge = torch.full((6, 1, 2, 2), 0.5), torch.zeros(6, dtype=torch.int64), [], Subject.judge
    x[:3] += 0.12
    monkeypatch.setattr(Subject, "judge", lambda self, x, *a, **b: counts.append(len(x)) or judge(self, x, *a, **b))
    Noting.begun.clear()
    report = evaluate(sure, x, y, eps=0.01, attacks=[Noting()], curve=[0.05, 0.1, 0.15, 0.25])
    assert [round(accuracy, 2) for _, accuracy in report.curve] == [1, 1, 1, 0.5, 0.5, 0]
    # at the report's own radius and the next one nothing is known
    assert Noting.begun[:2] == [None, None] and counts[-4:] == [6, 6, 3, 3]
    for begin, eps, standing in zip(Noting.begun[2:], (0.1, 0.15, 0.25), (6, 3, 3), strict=True):
        assert torch.allclose(begin[-standing:], x[-standing:] + eps)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"curve": [0.0]}, "curve must be radii above 0 and at most 1, got 0"),
        ({"curve": [8]}, "curve must be radii above 0 and at most 1, got 8"),
        ({"curve": ["8/255"]}, "each of curve must be a number, got '8/255'"),
        ({"attacks": [StAdv(), PGD(eps=0.1)]}, "curve needs an attack without eps"),
        ({"attacks": [PGD(), PGD(eps=0.08)]}, "curve must not contain L-inf 0.08, which PGD"),
    ],
)
def test_a_curve_that_cannot_be_made_is_refused(linear, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        judged(linear, **options)
