"""The most telling search comes first, useless gradients end a row, and a limit of time says what it left out. The
tests of the evidence by which an attack stops follow."""

import functools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from digit_nets import EPS, held_out, standard
from evaluating import evaluate
from reports import row, said
from small_models import Made
from torch import nn

from purify_fast.attacks import APGD, FABT, FGSM, PGD, AttackContext, JudgeContext, LeavingPGD, Square, StAdv
from purify_fast.attacks.base import TimeIsOver
from purify_fast.evaluation import AttackSpec, as_attack
from purify_fast.judge.request.deadline import Deadline
from purify_fast.judge.results.rows import CUT
from purify_fast.judge.run import measure as stopping
from purify_fast.judge.run.measure import NearestRule, Progress, StoppingRule, counted_model, nearest_first
from purify_fast.judge.searches.engine import BLIND
from purify_fast.protocols import Passes
from purify_fast.speed.graphs.graphed_loop import GraphedSteps


def shaken(how=lambda x: (4 * x).round() / 4):
    """The standard network behind random noise and a step without a gradient."""
    return Made(lambda self, x: self.net(how(x + 0.02 * torch.randn_like(x))), net=standard()).eval()


def judged(model, n=16, **options):
    return evaluate(model, *held_out(n), **{"eps": EPS, "protocol": "fast"} | options)


def work_of(text):
    """The numbers of forward passes and gradients in a report's fact."""
    words = text.replace(",", "").split()
    return int(words[0]), int(words[4])


def test_rows_without_a_gradient_end_with_their_first_step_and_say_so():
    report = judged(shaken())
    own = [row for row in report.rows if row.is_attack and not row.transferred]
    assert own and all(BLIND in row.warnings and row.lacked_gradients for row in own)
    assert all(BLIND not in row.warnings for row in report.rows if row.transferred)
    # the whole search of such a row would take 55 and 1,091 passes
    assert report.headline.accuracy < 0.3 and work_of(report.about["passes"])[1] < 400 and BLIND in report.to_markdown()


@pytest.mark.parametrize("draws", [1, 3])
def test_only_a_first_step_without_any_gradient_ends_a_run(draws):
    """Where one image of a batch has a gradient, its search goes on."""
    net, seen, (x, y) = standard(), [], held_out(2)

    def half(z):
        seen.append(z.requires_grad)
        kept = (torch.arange(len(z)) % 2 == 0)[:, None]
        logits = net(z)
        return torch.where(kept, logits, logits.detach())

    context = JudgeContext(eps=1e-4, num_classes=10, draws_differ=draws > 1, eot_iter=draws, counts_health=True)
    assert not APGD(steps=12).run(half, x, y, context).warnings and sum(seen) == 12
    seen.clear()
    blind = APGD(steps=12).run(lambda z: (seen.append(z.requires_grad), net(z.detach()))[1], x, y, context)
    # On a random model, 20 draws decide, at the steps after which a batch may shrink: 1 to 6, and 8.
    looks = 1 if draws == 1 else 8
    assert blind.warnings == [BLIND] and sum(seen) == looks
    # Each gradient that was taken counts once.
    assert blind.health.count("gradients") == blind.health.count("zero") == 2 * looks


def faulty(net, z):
    """One pixel of the first image has a gradient that is not finite."""
    return net(z) + 0 * (z[:, :1, 0, 0] * 0).sqrt()


def seldom(net, z):
    """Some draws lack a gradient."""
    return net(z) if torch.rand(()) < 0.2 else net(z.detach()) + 0 * z.sum()


def copied(net, z):
    """The likeliest wrong classes are copies of the label, without a gradient; the others have one."""
    return torch.cat([net(z), *(net(z) - 0.01 * number for number in (1, 2, 3))], 1)


RARE_GRADIENTS = [
    (faulty, APGD(steps=20), {"draws_differ": False}),
    (seldom, APGD(steps=50), {"eot_iter": 1}),
    (copied, APGD(steps=20, loss="margin_targeted", n_target_classes=4), {"num_classes": 40}),
]


@pytest.mark.parametrize(("model", "attack", "options"), RARE_GRADIENTS)
def test_gradients_that_are_there_now_and_then_are_followed(model, attack, options):
    x, y = held_out(16)
    torch.manual_seed(0)
    context = AttackContext(**{"eps": EPS, "num_classes": 10} | options)
    found = attack.run(functools.partial(model, standard()), x, y, context)
    assert not found.warnings and (standard()(found.images).argmax(1) == y).float().mean() < 0.5


def test_fast_ends_an_image_by_the_rule_of_the_report():
    """An image that four of five draws misclassify has fallen for "fast"; "standard" looks for a worse point."""
    net = standard()

    def mostly(z):
        lucky = torch.rand(len(z)) < 0.15
        push = 30 * torch.nn.functional.one_hot(net(z).argmax(1), 10) * lucky[:, None]
        return net(z) + push.detach()

    shares = {}
    for protocol, claim in (("fast", None), ("rand", None), ("fast", 50)):
        seen = []
        search = lambda *args, seen=seen, search=APGD.search: seen.append(args[4].judge_share) or search(*args)  # noqa: E731
        with mock.patch.object(APGD, "search", search):
            evaluate(mostly, *held_out(4), eps=EPS, protocol=protocol, steps=2, probes=False, claim=claim)
        shares[protocol, claim] = {round(share, 2) for share in seen}
    # A claim is about one draw, so the search goes on.
    assert shares == {("fast", None): {0.6}, ("rand", None): {1.0}, ("fast", 50): {1.0}}


# -- the plan and the limit of time ------------------------------------------------------------------------------------
class Timed:
    """A model whose calls take a second each of `clock`; a call with gradients, of some images, takes as long."""

    def __init__(self, model, clock):
        self.model, self.clock, self.calls = model, clock, 0

    def __call__(self, z):
        self.calls += 1
        self.clock.now += 1
        return self.model(z)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def test_a_limit_of_time_names_what_it_left_out_and_more_time_continues(tmp_path, clock):
    slow = Timed(standard(), clock)
    options = {"out": tmp_path, "revision": "1"}
    settings = {"protocol": "standard", "probes": False, "steps": 10, "n": 8}
    report = judged(slow, **options, **settings, minutes=1)
    (note,) = [note for note in report.notes if note.startswith("the time was over")]
    assert "left out" in note and len([row.attack for row in report.rows if row.is_attack]) < 9
    left = int(report.headline.robust.sum())
    assert f"each of the {left} image{'s' if left > 1 else ''} that" in note
    kept = len(list((tmp_path / "rows").iterdir()))
    assert kept == sum(CUT not in row.warnings for row in report.rows if row.kind != "worst")
    whole = judged(slow, **options, **settings, minutes=600)
    assert not any("time was over" in note for note in whole.notes)
    assert len([row for row in whole.rows if row.is_attack]) == 9
    # Rows that are finished are read although no time is left.
    again = judged(slow, **options, **settings, minutes=1e-9)
    assert [row.robust.tolist() for row in again.rows] == [row.robust.tolist() for row in whole.rows]
    assert "ended" in report.about and report.about["ended"] in report.to_markdown() and "ended" not in again.about
    # A row that was cut short is not kept: the result is that of a call without a limit.
    alone = judged(slow, **settings)
    assert [row.robust.tolist() for row in whole.rows] == [row.robust.tolist() for row in alone.rows]


def of_time(report):
    return [note for note in report.notes if note.startswith("the time was over")]


@pytest.mark.parametrize("protocol", ["fast", "standard", "strong"])
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("seconds", [45, 60, 120, 300])
def test_the_time_is_kept_in_every_phase(clock, protocol, random, seconds):
    """The limit is kept within a few passes in probes, surrogates, a search, a judgement and the signs.

    Every pass takes a second, whatever its images.
    """
    model = shaken() if random else standard()
    began, slow = clock.now, Timed(model, clock)
    report = judged(slow, n=8, protocol=protocol, steps=10, minutes=seconds / 60)
    spent = clock.now - began
    assert spent <= seconds + 10 and (spent >= seconds - 35 or not of_time(report))
    # Without an attack, the report has no headline, and says why.
    assert None in report.lowest or of_time(report)
    # A random model is judged by all of its draws.
    assert {row.n_eval for row in report.rows} == {5 if random else 1}


CUT_SHORT = [
    APGD(steps=40),
    APGD(steps=40, loss="margin_targeted"),
    FABT(steps=40),
    Square(n_queries=400),
    PGD(steps=40),
    PGD(steps=5, restarts=20),
    LeavingPGD(steps=40, look_every=5),
    StAdv(steps=40),
    as_attack(lambda model, x, y: [model(x) for _ in range(100)] and x, name="calls"),
]


@pytest.mark.parametrize("attack", CUT_SHORT, ids=lambda attack: f"{attack.kind}-{type(attack).__name__}")
def test_an_attack_that_is_cut_short_hands_over_its_best_points(clock, attack):
    """Images that fell before the end count, and the row says that it was cut."""
    slow = Timed(standard(), clock)
    began = clock.now
    report = judged(slow, protocol=None, attacks=[attack], n=16, eps=EPS, probes=False, minutes=50 / 60)
    (row,) = [row for row in report.rows if row.is_attack]
    assert CUT in row.warnings and clock.now - began <= 55 and of_time(report)
    # All images were in the batch that was cut.
    assert row.unsearched == 16 and (row.accuracy < 1 or attack.kind in ("function", "stadv", "square"))


def test_a_replayed_step_asks_for_the_time(clock):
    """A replay runs no Python code of the model: the loop that replays counts, and so asks."""
    deadline = Deadline()
    model = counted_model(standard(), Progress(deadline=deadline))
    deadline.begin(clock.now + 5)
    steps = GraphedSteps(lambda state: state, {"point": torch.zeros(1)}, lambda *step: None)
    steps.captured = mock.Mock(replay=lambda: setattr(clock, "now", clock.now + 1))
    steps.counters = [(model, Passes(4, 4))]
    # An error handler of a model does not catch the end of the time.
    assert not issubclass(TimeIsOver, Exception)
    with pytest.raises(TimeIsOver):
        for _ in range(100):
            steps.advance()
    assert clock.now <= 1006


# -- evidence by which an attack stops ---------------------------------------------------------------------------------
# An attack searches the images first to which others came nearest, and stops by evidence that the report states.


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
