"""An attack searches the images first to which others came nearest, and stops by evidence that the report states."""

import numpy as np
import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast.attacks import APGD, FGSM, PGD, Square
from purify_fast.evaluation import AttackSpec
from purify_fast.judge.run import attack_run as stopping
from purify_fast.judge.run.attack_run import NearestRule, StoppingRule, nearest_first


def test_the_bound_is_the_exact_one_for_images_of_which_none_fell():
    fell, stood = -0.1, 0.1
    rule = StoppingRule(0.01, 300, 1000)
    assert rule.may_hold == 300 and not rule.record([fell] * 40, 0)
    assert rule.may_hold == rule.unsearched == 260
    assert not rule.record([stood] * 10 + [fell] + [stood] * 29, 0)
    # 29 withstood since the last one fell
    chance = rule.may_hold / rule.unsearched
    assert rule.unsearched == 220 and (1 - chance) ** 29 == pytest.approx(0.05 / 8)
    stops = rule.record([stood] * 40, 0)
    assert rule.may_hold == pytest.approx((220 - 40) * (1 - (0.05 / 8) ** (1 / 69))) and not stops
    # where no search moved an image, nothing is known
    blind = StoppingRule(0.01, 300, 1000)
    assert not any(blind.record([stood] * 50, 50) for _ in range(5)) and blind.may_hold == blind.unsearched == 50


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_the_bound_holds_in_95_of_100_cases(rate):
    """Images of which all fall with one probability, the hardest case: later ones hardly fall less often."""
    generator, within, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        fell = generator.random(400) < rate
        rule, searched = StoppingRule(0.02, 400, 1000), 0
        for size in rule.rounds:
            part = fell[searched : searched + size]
            searched += len(part)
            if rule.record([-1.0 if each else 1.0 for each in part], 0):
                break
        within += fell[searched:].sum() <= np.ceil(rule.may_hold)
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
    assert 0 < row.unsearched < row.attacked
    assert 0 < row.may_hold <= 0.04 * 96
    # The bound counts the decisions: one after each round, however many batches a round has.
    parts = evaluate(model, x, y, eps=0.02, attacks=attacks, batch_size=3).row("APGD-20 margin")
    assert (parts.unsearched, parts.may_hold) == (row.unsearched, row.may_hold)
    assert (parts.robust == row.robust).all()
    whole = evaluate(model, x, y, eps=0.02, attacks=[FGSM(), APGD(steps=20, loss="margin")])
    missed = int(row.robust.sum()) - int((whole.rows[1].robust & whole.rows[2].robust).sum())
    assert 0 <= missed <= row.may_hold
    note = next(note for note in report.notes if "not searched" in note)
    assert f"at most {100 * row.may_hold / 96:.2f} points" in note and note in " ".join(report.to_text().split())
    # the order that margins give decides, not the place in the batch
    shuffled = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    again = evaluate(model, x[shuffled], y[shuffled], eps=0.02, attacks=attacks)
    assert again.row("APGD-20 margin").unsearched > 0


def test_the_few_nearest_are_those_of_least_margin():
    model, x, y = _far_and_near()
    attacks = [FGSM(), AttackSpec(Square(n_queries=30), survivors_only=True, nearest=20)]
    report = evaluate(model, x, y, eps=0.02, attacks=attacks)
    first, row = report.rows[1], report.row("Square, 30 queries, 20 nearest")
    assert row.attacked == 20 and 0 < row.unsearched <= 15
    assert any(f"20 nearest: {20 - row.unsearched}" in note for note in report.notes)
    left = first.margins[first.robust]
    fell = first.robust & ~row.robust
    assert np.isin(first.margins[fell], np.sort(left)[: row.attacked - row.unsearched]).all()
    assert not row.robust[~first.robust].any()


def test_a_group_of_the_nearest_follows_while_the_next_image_is_within_the_gain():
    before = [0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.8, 0.9, 1.0, 1.1, 1.2, float("nan")]
    # The third image came nearer by 0.25, which is less than the sixth would need.
    rule = NearestRule(before)
    assert rule.record([0.1, 0.2, 0.05, 0.6, 0.5], 0) and rule.unsearched == 7
    # The fifth fell: its whole margin was within reach, and so is the next. Then no image comes that far again.
    rule = NearestRule([*before[:5], 0.5, *before[6:]])
    assert not rule.record([0.1, 0.2, 0.3, 0.4, -0.3], 0) and rule.gain == 0.5
    assert rule.record([0.5, 0.8, 0.9, 1.0, 1.1], 0) and rule.unsearched == 2
    # What earlier searches gained is within reach of this attack too, so the first group has all of these images.
    rule = NearestRule(before, gain=0.6)
    assert rule.rounds == [6, 5, 1] and rule.record([0.1, 0.2, 0.3, 0.4, 0.5, 0.55], 0)
    # The distance of an image that no attack has reached is unknown, so it is not nearer than any gain.
    rule = NearestRule([float("nan")] * 12)
    assert not rule.record([0.5] * 5, 0) and not rule.record([0.5] * 5, 0)
    assert not rule.record([0.5] * 2, 0) and rule.unsearched == 0


def _rough():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    x = 0.3 + 0.4 * torch.rand(96, 3, 2, 2)
    return model, x, model(x).argmax(1)


def test_a_kept_row_of_the_nearest_images_is_made_again_for_another_gain(tmp_path):
    model, x, y = _rough()
    weak = AttackSpec(PGD(steps=1, random_start=False, alpha=1e-4), survivors_only=True)
    attacks = [AttackSpec(FGSM(), survivors_only=True)]
    attacks.append(AttackSpec(Square(n_queries=30), survivors_only=True, nearest=40))
    tried = []
    for chosen, out in ((attacks, tmp_path), ([weak, *attacks], tmp_path), ([weak, *attacks], None)):
        row = evaluate(model, x, y, eps=0.02, attacks=chosen, out=out).row("Square, 30 queries, 40 nearest")
        tried.append(row.attacked - row.unsearched)
    assert tried[0] < tried[1] == tried[2]


def test_of_a_random_model_every_image_is_searched():
    model, x, y = _far_and_near()

    def noisy(images):
        return model(images) + 1e-4 * torch.randn(len(images), 5)

    attacks = [FGSM(), AttackSpec(APGD(steps=3), survivors_only=True, until=0.5)]
    report = evaluate(noisy, x, y, eps=0.01, eot_iter=1, n_eval=2, attacks=attacks)
    assert report.rows[2].unsearched == 0
