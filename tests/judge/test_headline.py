"""The number of a report: one criterion with and without an attack, what fell to probes, reasons, and claims."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from digit_nets import zoo_digits
from evaluating import evaluate
from reports import drawn, forms, probed, row, said
from torch import nn

import purify_fast
from purify_fast.attacks import PGD
from purify_fast.evaluation import Report
from purify_fast.judge.results.rows import Worst, chance_of_at_most, count_fallen, judge_claim, worst_rows


def joined(text):
    return " ".join(text.split())


def test_other_draws_judge_than_those_that_choose():
    """The choosing draws alone decide between points, and the margin between equal ones."""
    clean = drawn("clean", [5, 5, 5, 5], [0, 0, 0, 0], kind="clean")
    a = drawn("a", [0, 1, 2, 3], [1, 5, 5, 0], margins=[0.5, 0.1, 0.1, 1.0])
    b = drawn("b", [4, 4, 4, 4], [2, 5, 4, 0], margins=[0.9, 0.0, 0.0, 0.9])
    (worst,) = worst_rows([clean, a, b])
    assert worst.right.tolist() == [4, 4, 2, 4] and worst.wrong.tolist() == [0.2, 0.5, 0.5, 0]
    assert worst.mean == 14 / 20 and worst.mean_error == pytest.approx(np.std([0.8, 0.8, 0.4, 0.8]) / 2)
    # a model that draws once per call: the draws differ too
    shared = drawn("c", [5, 0], [0, 10], of_draws=[0.25, 0.75, 0.25, 0.75, 0.5])
    assert shared.mean_error == pytest.approx(math.sqrt(0.25 / 2 + np.var([1, 3, 1, 3, 2], ddof=1) / 16 / 5))
    # points of probes count if the choosing draws call them worse
    points = Worst(np.array([0.1, 1.0]), np.array([-5.0, -5.0]), np.array([0, 1]))
    count_fallen([worst], [0, 3], points)
    assert worst.right.tolist() == [4, 4, 2, 1] and worst.fell_to_probes == 1
    # the lowest of several noisy numbers is partly luck: the judging draws choose no headline
    lucky = drawn("lucky", [0, 0, 0, 0], [0, 0, 0, 0])
    assert Report([clean, a, lucky]).headline is a


def test_what_fell_to_a_probe_is_not_left():
    rows = [row("clean", [1, 1, 1, 1], kind="clean"), row("A", [1, 1, 1, 0]), row("worst", [1, 1, 1, 0], kind="worst")]
    far = row("worst, L-inf 0.2", [1, 1, 1, 0], kind="worst", threat="L-inf 0.2")
    count_fallen([*rows, far], [0, 2, 7])
    assert rows[2].robust.tolist() == [False, True, False, False]
    assert rows[2].mean == 0.25 and rows[1].accuracy == far.accuracy == 0.75
    # a number of 0 cannot be too high, whoever took the rest
    assert said(rows[:2], probed(4, left=[1, 1, 1, 0], fell=[1, 1, 1, 0]))["missed images"].verdict == "noted"


def test_a_rounding_defence_loses_what_its_softened_copies_find():
    """Its attacks have no gradients and find nothing; the probes, along other gradients, do."""
    model, (x, y) = purify_fast.zoo.load("digits-standard"), zoo_digits(24)
    options = {"eps": 0.1, "attacks": [PGD(steps=3)], "probes": True}
    report = evaluate(lambda images: model((images * 7).round() / 7), x, y, **options)
    attacked, worst = report.row("PGD-3 ce"), report.row("worst")
    found = {finding.alarm: finding for finding in report.findings}
    parts = int(found["missed images"].measured.split(" of ")[0])
    assert attacked.accuracy > 0.9 and parts > 5
    assert attacked.robust.sum() - worst.robust.sum() == worst.fell_to_probes == parts
    assert np.all(attacked.robust >= worst.robust) and report.headline is worst
    # the same report again, from its file
    assert Report.from_json(report.to_json()).to_markdown() == report.to_markdown()


@pytest.mark.parametrize(
    ("cosine", "why", "advice"),
    [
        ("not finite", "logits or gradients are not finite", "an overflow of exp()"),
        ("no gradient", "there is no gradient", "torch.no_grad()"),
        ("zero gradient", "the gradient is zero everywhere", "rounding, sign, argmax"),
    ],
)
def test_attacks_along_no_gradient_have_not_asked_anything(cosine, why, advice):
    rows = [row("clean", [1] * 8, kind="clean"), row("A", [1] * 7 + [0], health=None)]
    asked = {"n": 8, "cosine": cosine, "left": [1] * 7 + [0]}
    assert said(rows, probed(**asked))["missed images"].verdict == "not asked"
    # a short attack that found images all the same tells
    assert said(rows, probed(**asked, fell=[1] * 4 + [0] * 4))["missed images"].verdict == "unreliable"
    # without counted gradients this alone raises the alarm
    alone = said(rows, probed(**asked))["gradient health"]
    assert (alone.verdict, alone.measured.startswith(why), advice in alone.advice) == ("unreliable", True, True)


def test_an_attack_without_counted_gradients_is_a_reason_of_its_own():
    model, (x, y) = purify_fast.zoo.load("digits-standard"), zoo_digits(8)
    options = {"eps": 1e-3, "attacks": [lambda model, x, y: x.clone()]}
    report = evaluate(model, x, y, **options)
    assert not report.headline.reliable
    # the probes have followed the gradients, and found nothing against them
    asked = evaluate(model, x, y, **options, probes=True)
    assert asked.headline.reliable
    zero = evaluate(lambda images: model(images.round()), x, y, **options, probes=True)
    assert not zero.headline.reliable or zero.headline.accuracy == 0


@pytest.mark.parametrize(("left", "n", "share"), [(0, 20, "1/2"), (13, 20, "7/10"), (20, 20, "1/5"), (140, 200, "3/4")])
def test_the_binomial_tail_is_exact(left, n, share):
    assert chance_of_at_most(19, 20, 1.0) == 0 and chance_of_at_most(20, 20, 1.0) == chance_of_at_most(0, 20, 0.0) == 1
    p = Fraction(share)
    exact = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(left + 1))
    assert chance_of_at_most(left, n, float(p)) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(
    ("left", "n", "claim", "verdict", "told"),
    [
        (100, 200, "70", "refuted", "the probability that 100 or fewer of 200 images are left"),
        (13, 20, "70", "not refuted", "(exact binomial test; refuted below 1 %). More images may decide."),
        (15, 20, "70", "not refuted", "15 of 20 images are left (75.0 %), which is not below the claim"),
        (0, 4, "0", "not refuted", "that 0 or fewer of 4 images are left would be 100 %"),
    ],
)
def test_a_report_answers_a_claim(left, n, claim, verdict, told):
    report = Report([row("A", [1] * left + [0] * (n - left))], about={"claim": claim})
    assert report.claim_test().verdict == verdict and all(told in joined(text) for text in forms(report))


def test_a_random_model_is_tested_by_one_draw():
    """Half of the images are right in all draws, as of draws that are right with probability 0.87: 87 % are true."""
    clean = drawn("clean", [5] * 100, [0] * 100, kind="clean")
    attacked = drawn("A", [5] * 50 + [4] * 35 + [3] * 15, [0] * 100)
    report = Report([clean, attacked], about={"claim": "87"})
    assert report.claim_test().verdict == "not refuted" and report.claim_test().left == 87
    report.about["claim"] = "97"
    assert report.claim_test().verdict == "refuted"
    # All images of a call share a draw, so the best draw counts. The draws may be those of another attack.
    for lower in (0.0, 0.3):
        attacked.of_draws = [draw - lower for draw in (0.94, 0.86, 0.85, 0.85, 0.85)]
        assert report.claim_test().verdict == "not refuted" and report.claim_test().left == 94
        told = "94 of 100 images are left (94.0 %: the 87.0 % of single draws, raised to the best draw because all"
        assert all(told in joined(text) for text in forms(report))


def test_each_number_of_a_random_model_stands_with_its_rule():
    """13 of 80 draws are right, on 16 images: 16.2 % is a share of draws, and no number of images."""
    rows = [drawn("clean", [5] * 16, [0] * 16, kind="clean"), drawn("A", [4] * 2 + [1] * 5 + [0] * 9, [8] * 16)]
    report = Report([*rows, *worst_rows(rows)], about={"claim": "20"})
    for text in map(joined, forms(report)):
        assert "of 16 images are still classified correctly in all 5 draws after the attack (16.2 ± " in text
        assert "3 of 16 images are left (16.2 % of single draws; rounded up to whole images), which is below" in text
        assert "16.2 % of 16" not in text
    # a single prediction has no draws
    for text in map(joined, forms(Report([row("A", [1, 0, 0, 1])], about={"claim": "20"}))):
        assert "of 4 images are still classified correctly under A" in text


@pytest.mark.parametrize("claim", [-1, 101, math.nan, "70", True, 0.7, 1])
def test_a_claim_is_a_percentage(claim):
    """It is refused before the model is looked at; a share such as 0.7 is refused too."""
    with pytest.raises((TypeError, ValueError), match="claim must be"):
        evaluate(None, None, None, eps=0.1, claim=claim)


def test_a_claim_is_not_tested_by_predictions_without_a_class():
    """The model returns NaN on attacked images only."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(8, 1, 4, 4) / 2 + 0.25
    x[:, 0, 0, 0] = 0.5

    def broken(images):
        return model(images) + torch.where((images[:, 0, 0, 0] - 0.5).abs() < 1e-6, 0.0, torch.nan)[:, None]

    report = evaluate(broken, x, model(x).argmax(1), eps=0.1, attacks=[PGD(steps=1)], claim=95)
    assert report.row("clean").accuracy == 1 and report.headline.accuracy == 0
    assert report.about["claim_test"] == "not tested" and report.headline.nonfinite_predictions == 8


def test_a_claim_is_tested_only_by_images_with_classes_that_were_attacked():
    """A few predictions without a class do not save a claim that the others refute."""
    attacked, clean, nothing = (
        row("A", [0] * 60 + [1] * 40),
        row("clean", [1], kind="clean"),
        row("worst", [0], kind="worst"),
    )
    for broken, verdict in ((0, "refuted"), (5, "refuted"), (58, "not tested")):
        attacked.nonfinite_predictions = broken
        assert judge_claim(0.95, attacked, None).verdict == verdict
    clean.nonfinite_predictions, nothing.attacked = 1, 0
    for rows in ([clean, row("A", [0])], [nothing]):
        assert Report(rows, about={"claim": "99"}).claim_test().verdict == "not tested"
    assert Report([attacked]).claim_test() is None
