"""An attack searches the images first to which others came nearest, and stops by evidence that the report states."""

import math

import numpy as np
import pytest
import torch
from evaluating import evaluate
from reports import row, said
from torch import nn

from purify_fast.attacks import APGD, FGSM, PGD
from purify_fast.evaluation import AttackSpec
from purify_fast.judge.results.rows import CUT
from purify_fast.judge.run import measure as stopping
from purify_fast.judge.run.measure import NearestRule, StoppingRule, nearest_first


def _most_unsearched(left, withstood, error):
    """The most images that can fall, if all being among the unsearched ones must have at least the probability."""
    ways = [math.comb(left, fall) / math.comb(left + withstood, fall) for fall in range(left + 1)]
    return max(fall for fall, chance in enumerate(ways) if chance >= error)


def test_the_bound_is_the_exact_one_for_images_of_which_none_fell():
    fell, stood = -0.1, 0.1
    rule = StoppingRule(0.01, 300, 1000)
    assert rule.may_hold == 300 and not rule.record([fell] * 40, 0) and rule.may_hold == rule.unsearched == 260
    assert not rule.record([stood] * 10 + [fell] + [stood] * 29, 0)
    # 29 withstood since the last one fell
    assert rule.unsearched == 220 and rule.may_hold == _most_unsearched(220, 29, 0.05 / 8)
    stops = rule.record([stood] * 40, 0)
    assert rule.may_hold == _most_unsearched(180, 69, 0.05 / 8) == 15 and not stops
    # where no search moved an image, nothing is known
    blind = StoppingRule(0.01, 300, 1000)
    assert not any(blind.record([stood] * 50, 50) for _ in range(5)) and blind.may_hold == blind.unsearched == 50


BOUNDS = [(400, 1000, 0.02, 0.02), (400, 1000, 0.02, 0.1), (150, 200, 0.01, 0.01), (240, 250, 0.01, 0.02)]


@pytest.mark.parametrize(("images", "total", "share", "rate"), BOUNDS)
def test_the_bound_holds_in_95_of_100_cases(images, total, share, rate):
    """Images of which all fall with one probability, the hardest case: later ones hardly fall less often."""
    generator, within, trials = np.random.default_rng(0), 0, 2000
    for _ in range(trials):
        fell = generator.random(images) < rate
        rule, searched = StoppingRule(share, images, total), 0
        for size in rule.rounds:
            part = fell[searched : searched + size]
            searched += len(part)
            if rule.record([-1.0 if each else 1.0 for each in part], 0):
                break
        within += fell[searched:].sum() <= rule.may_hold
    assert within / trials >= 0.95


def test_the_order_is_by_margin_with_some_images_drawn_by_lot():
    margins = np.random.default_rng(0).random(400).astype(np.float32)
    margins[7] = np.nan
    order = nearest_first(torch.arange(400), margins, 0)
    assert sorted(order.tolist()) == list(range(400))
    rank = np.argsort(np.argsort(np.nan_to_num(margins, nan=9.0)))[order[:50]]
    assert 2 <= (rank >= 60).sum() <= 18 and np.isin(np.arange(25), rank).all()


def _far_and_near(count=96):
    """A linear model, its images, and radii within which only the first few can fall."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    x = 0.4 + 0.2 * torch.rand(count, 3, 2, 2)
    with torch.no_grad():
        logits = linear(x)
        y = logits.argmax(1)
        # scaled images stay in order, and the last ones are far from every border
        lead = logits.gather(1, y[:, None]) - logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True)
    order = lead[:, 0].argsort()
    return linear, x[order], y[order]


def test_an_attack_stops_and_the_report_states_what_the_rest_may_hold(monkeypatch):
    monkeypatch.setattr(stopping, "SMALLEST", 8)
    model, x, y = _far_and_near()
    attacks = [FGSM(), AttackSpec(APGD(steps=20, loss="margin"), survivors_only=True, until=0.04)]
    report = evaluate(model, x, y, eps=0.02, attacks=attacks)
    row = report.row("APGD-20 margin")
    assert 0 < row.unsearched < row.attacked and 0 < row.may_hold <= 0.04 * 96
    # The bound counts the decisions: one after each round, however many batches a round has.
    parts = evaluate(model, x, y, eps=0.02, attacks=attacks, batch_size=3).row("APGD-20 margin")
    assert (parts.unsearched, parts.may_hold) == (row.unsearched, row.may_hold) and (parts.robust == row.robust).all()
    whole = evaluate(model, x, y, eps=0.02, attacks=[FGSM(), APGD(steps=20, loss="margin")])
    missed = int(row.robust.sum()) - int((whole.rows[1].robust & whole.rows[2].robust).sum())
    assert 0 <= missed <= row.may_hold
    note = next(note for note in report.notes if "not searched" in note)
    assert f"at most {100 * row.may_hold / 96:.2f} points" in note and note in " ".join(report.to_text().split())
    # the order that margins give decides, not the place in the batch
    shuffled = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    again = evaluate(model, x[shuffled], y[shuffled], eps=0.02, attacks=attacks)
    assert again.row("APGD-20 margin").unsearched > 0


def near(model, x, y, falls, group=5, **options):
    """The report of an attack that fools the model on the ``falls`` nearest images, in groups of the nearest images."""
    # The limit is between two margins, because other batches round differently.
    limit = margins_of(model, x, y).sort().values[falls - 1 : falls + 1].mean() if falls else -1.0

    def search(target, images, labels):
        falling = margins_of(target, images, labels) <= limit
        wrong = torch.stack([x[(y != label).nonzero()[0, 0]] for label in labels])
        return torch.where(falling[:, None, None, None], wrong, images)

    weak = AttackSpec(PGD(steps=1, random_start=False, alpha=1e-5), survivors_only=True)
    attacks = [weak, AttackSpec(search, label="search", survivors_only=True, nearest=group)]
    return evaluate(model, x, y, eps=1.0, attacks=attacks, **options)


def margins_of(model, x, y):
    with torch.no_grad():
        logits = model(x)
    return (logits.gather(1, y[:, None]) - logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize(("falls", "tried"), [(1, 10), (5, 10), (23, 30), (94, 96)])
def test_an_attack_goes_on_until_a_whole_group_of_the_nearest_images_withstands(falls, tried, batch_size):
    model, x, y = _far_and_near()
    report = near(model, x, y, falls, batch_size=batch_size)
    search = report.row("search")
    assert (search.attacked - search.unsearched, int(search.robust.sum())) == (tried, 96 - falls)
    # The images that withstood are those farthest from misclassification.
    assert search.robust.tolist() == [False] * falls + [True] * (96 - falls)
    assert any(f"search: {tried}" in note for note in report.notes) == (tried < 96)
    assert f"96 ({tried})" in report.to_text()


# Where all of the first 91 or more images fall, no group is left that could withstand.
FALLS = [(0, "passed", 0), (23, "passed", 0), (91, "noted", 1), (93, "unreliable", 3)]


@pytest.mark.parametrize(("falls", "verdict", "last"), FALLS)
def test_a_sign_tells_where_images_fell_in_the_last_group_that_was_tried(falls, verdict, last):
    model, x, y = _far_and_near(95)
    report = near(model, x, y, falls)
    search = report.row("search")
    (sign,) = [finding for finding in report.findings if finding.alarm == "nearest images"]
    assert (sign.verdict, search.last_fallen) == (verdict, last)
    assert ("nearest images" in report.headline.doubts) == (verdict == "unreliable")
    assert not last or f"{last} of the last images that search tried fell" in sign.measured


def test_the_sign_is_silent_where_the_time_was_over():
    nearest = row(settings={"nearest": [10, 2]})
    assert said([nearest])["nearest images"].verdict == "passed"
    cut = row("Square", settings={"nearest": [10, 2]}, warnings=[CUT])
    assert said([nearest, cut])["nearest images"].verdict == "not asked" and "nearest images" not in said([row()])


def test_a_random_model_has_a_single_group_and_the_sign():
    model, x, y = _far_and_near()

    def noisy(images):
        return model(images) + 1e-4 * torch.randn(len(images), 5)

    report = near(noisy, x, y, 50, group=20, eot_iter=1, n_eval=2)
    search = report.row("search")
    assert (search.attacked, search.unsearched, search.last_fallen) == (20, 0, 20)
    (sign,) = [finding for finding in report.findings if finding.alarm == "nearest images"]
    assert sign.verdict == "unreliable"


def test_the_rule_of_the_nearest_images():
    rule = NearestRule(25, 10)
    assert rule.rounds == [10, 10, 5] and not rule.record([0.1] * 9 + [-0.1], 0) and rule.unsearched == 15
    assert not rule.record([float("nan"), *[0.1] * 9], 0)
    assert rule.record([0.1] * 5, 0) and rule.unsearched == 0 and rule.may_hold == 0
    assert NearestRule(0, 10).rounds == []


def test_of_a_random_model_every_image_is_searched():
    model, x, y = _far_and_near()

    def noisy(images):
        return model(images) + 1e-4 * torch.randn(len(images), 5)

    attacks = [FGSM(), AttackSpec(APGD(steps=3), survivors_only=True, until=0.5)]
    report = evaluate(noisy, x, y, eps=0.01, eot_iter=1, n_eval=2, attacks=attacks)
    assert report.rows[2].unsearched == 0
