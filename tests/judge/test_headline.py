"""The number of a report: one criterion with and without an attack, what fell to probes, reasons, and claims."""

import math
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from digit_nets import zoo_digits
from evaluating import evaluate
from reports import MASKED, drawn, forms, probed, row, said
from torch import nn

import purify_fast
from purify_fast import zoo
from purify_fast.attacks import PGD
from purify_fast.defences import NoisyEnsemble, WithFixedNoise, WithoutNoise
from purify_fast.evaluation import AttackSpec, Report
from purify_fast.judge.alarms.signs import Finding
from purify_fast.judge.estimates import Estimate, chance_of_at_most
from purify_fast.judge.request.deadline import Subject
from purify_fast.judge.results.rows import Points, worst_rows
from purify_fast.judge.show.report import judge_claim
from purify_fast.judge.show.text import notes_on_rows


def joined(text):
    return " ".join(text.split())


def test_other_draws_judge_than_those_that_choose():
    """The choosing draws alone decide between points, and the margin between equal ones."""
    clean = drawn("clean", [5, 5, 5, 5], [0, 0, 0, 0], kind="clean")
    a = drawn("a", [0, 1, 2, 3], [1, 5, 5, 0], margins=[0.5, 0.1, 0.1, 1.0])
    b = drawn("b", [4, 4, 4, 4], [2, 5, 4, 0], margins=[0.9, 0.0, 0.0, 0.9])
    (worst,) = worst_rows([clean, a, b])
    assert worst.right.sum(0).tolist() == [4, 4, 2, 4] and worst.wrong.tolist() == [0.2, 0.5, 0.5, 0]
    assert worst.mean == 14 / 20
    # points of probes count if the choosing draws call them worse
    probed = drawn("probes", [0, 5, 5, 1], [1, 0, 0, 10], margins=[-5.0, 1.0, 1.0, -5.0])
    (worst,) = worst_rows([clean, a, b], probed)
    assert worst.right.sum(0).tolist() == [4, 4, 2, 1] and worst.fell_to_probes == 1
    # the lowest of several noisy numbers is partly luck: the judging draws choose no headline
    assert Report([clean, a, drawn("lucky", [0, 0, 0, 0], [0, 0, 0, 0])]).headline is a


def test_an_attack_on_fewer_images_does_not_choose_the_headline():
    """By chance, the first images may have a lower accuracy. The headline counts all images. A note names the row."""
    rows = [row("clean", [1] * 4, kind="clean"), row("A", [0, 1, 1, 1]), row("A again, first 2", [0, 1])]
    report = Report([*rows, *worst_rows(rows)])
    assert report.row("worst, first 2").accuracy == 0.5
    assert report.headline is report.row("worst") and report.headline.accuracy == 0.75
    (note, *_) = notes_on_rows(rows, report.headline)
    assert note.endswith("the attacks on 4 images, and not those on fewer: A again, first 2")
    assert not any("on fewer" in note for note in notes_on_rows(rows[:2], report.headline))


def test_what_fell_to_a_probe_is_not_left():
    rows = [row("clean", [1, 1, 1, 1], kind="clean"), row("A", [1, 1, 1, 0]), row("first two", [1, 1])]
    far = [row(name, [1, 1, 1, 0], threat="L-inf 0.2") for name in ("B", "C")]
    worst, first, other = worst_rows([*rows, *far], row("probes", [0, 1, 0, 1]))
    assert worst.robust.tolist() == [False, True, False, False] and first.robust.tolist() == [False, True]
    assert (worst.fell_to_probes, first.fell_to_probes, other.fell_to_probes) == (2, 1, None)
    assert worst.mean == 0.25 and rows[1].accuracy == other.accuracy == 0.75
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


def test_an_attack_without_counted_gradients_is_a_reason_of_its_own():
    model, (x, y) = purify_fast.zoo.load("digits-standard"), zoo_digits(8)
    options = {"eps": 1e-3, "attacks": [lambda model, x, y: x.clone()]}
    assert not evaluate(model, x, y, **options).headline.reliable
    # the probes have followed the gradients, and found nothing against them
    assert evaluate(model, x, y, **options, probes=True).headline.reliable
    zero = evaluate(lambda images: model(images.round()), x, y, **options, probes=True)
    assert not zero.headline.reliable or zero.headline.accuracy == 0


@pytest.mark.parametrize(("left", "n", "share"), [(0, 20, "1/2"), (13, 20, "7/10"), (20, 20, "1/5"), (140, 200, "3/4")])
def test_the_binomial_tail_is_exact(left, n, share):
    assert chance_of_at_most(19, 20, 1.0) == 0 and chance_of_at_most(20, 20, 1.0) == chance_of_at_most(0, 20, 0.0) == 1
    p = Fraction(share)
    exact = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(left + 1))
    assert chance_of_at_most(left, n, float(p)) == pytest.approx(float(exact), rel=1e-9)


CLAIMS = [
    (100, 200, "70", "refuted", "the probability that 100 or fewer of 200 images are left"),
    (13, 20, "70", "not refuted", "(exact binomial test; refuted below 1 %). More images may decide."),
    (15, 20, "70", "not refuted", "15 of 20 images are left (75.0 %), which is not below the claim"),
    (0, 4, "0", "not refuted", "that 0 or fewer of 4 images are left would be 100 %"),
]


@pytest.mark.parametrize(("left", "n", "claim", "verdict", "told"), CLAIMS)
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


def test_a_claim_about_shared_draws_needs_many_of_them():
    """Draws that are right on 40 or on 60 % of the images: few tell little, and many give an upper end."""
    order = np.random.default_rng(0).permuted(np.tile(np.arange(100), (60, 1)), axis=1)
    right = order < np.repeat([[40], [60]], 30, axis=0)
    report = Report([row("A", right=right)], about={"claim": "65"})
    test = report.claim_test()
    assert test.verdict == "refuted" and 0.51 < test.bound < 0.55
    assert all("must also be above" in joined(text) for text in forms(report))
    report.about["claim"] = f"{100 * test.bound - 1:.1f}"
    assert report.claim_test().verdict == "not refuted"
    few = Report([row("A", right=right[::3])], about={"claim": "99"})
    assert few.claim_test().verdict == "not tested"
    assert all("the test needs n_eval=50 predictions of each, got 20" in joined(text) for text in forms(few))


@pytest.mark.parametrize(("shared", "own"), [(0.0, 0.3), (0.3, 0.0), (0.3, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize("draws", [5, 20])
def test_an_error_is_that_of_other_images_and_other_draws(shared, own, draws):
    """Noise that images share, or that each has, moves a score: 400 tables of 60 images."""
    rng, tables = np.random.default_rng(1), 400
    scores = rng.normal(0.2, 0.3, (tables, 1, 60))
    scores = scores + shared * rng.normal(size=(tables, draws, 1)) + own * rng.normal(size=(tables, draws, 60))
    rows = [row("A", right=right > 0) for right in scores]
    true = 0.5 + 0.5 * math.erf(0.2 / math.sqrt(2 * (0.3**2 + shared**2 + own**2)))
    assert 0.9 < math.sqrt(np.mean([one.mean_error**2 for one in rows])) / np.std([one.mean for one in rows]) < 1.15
    covered = np.mean([one.mean_interval[0] <= true <= one.mean_interval[1] for one in rows])
    # With five draws, Satterthwaite's degrees of freedom are themselves estimated from five numbers.
    assert covered > (0.87 if shared and draws == 5 else 0.93)
    found = np.mean([one.images_share_draws for one in rows])
    assert found > 0.95 if shared else found < 0.03


def test_each_number_of_a_random_model_stands_with_its_rule():
    """13 of 80 draws are right, on 16 images: 16.2 % is a share of draws, and no number of images."""
    rows = [drawn("clean", [5] * 16, [0] * 16, kind="clean"), drawn("A", [4] * 2 + [1] * 5 + [0] * 9, [8] * 16)]
    report = Report([*rows, *worst_rows(rows)], about={"claim": "20"})
    for text in map(joined, forms(report)):
        assert "of 16 images are still classified correctly in all 5 draws after the attack (16.2 (" in text
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


def test_a_claim_is_tested_only_by_images_with_classes_that_were_attacked():
    """A few predictions without a class do not save a claim that the others refute."""
    attacked, clean = row("A", [0] * 60 + [1] * 40), row("clean", [1], kind="clean")
    nothing = row("worst", [0], kind="worst")
    for broken, verdict in ((0, "refuted"), (5, "refuted"), (58, "not tested")):
        attacked.nonfinite_predictions = broken
        assert judge_claim(0.95, attacked, None).verdict == verdict
    clean.nonfinite_predictions, nothing.attacked = 1, 0
    for rows in ([clean, row("A", [0])], [nothing]):
        assert Report(rows, about={"claim": "99"}).claim_test().verdict == "not tested"
    assert Report([attacked]).claim_test() is None


class Noisy(nn.Module):
    """A purifier that adds noise; ``fixed_noise`` seeds in every call, once per block, or draws for every place."""

    def __init__(self, seeds="call", sigma=0.2, quiet=True):
        super().__init__()
        self.classifier, self.seeds, self.sigma, self.quiet = zoo.load("digits-pgd-at"), seeds, sigma, quiet
        self.seed = self.generator = None
        self.off = False

    def purify(self, x):
        if self.off:
            return x
        if self.seed is None:
            return x + self.sigma * torch.randn(x.shape)
        one_for_all = self.seeds == "call"
        generator = self.generator if self.seeds == "block" else torch.Generator().manual_seed(self.seed)
        return x + self.sigma * torch.randn(x.shape[1:] if one_for_all else x.shape, generator=generator)

    def forward(self, x):
        return self.classifier(self.purify(x))

    def fixed_noise(self, seed):
        return mock.patch.multiple(self, seed=seed, generator=torch.Generator().manual_seed(seed))

    def deterministic(self):
        return mock.patch.object(self, "off", self.quiet)


def judged(model, attacks, n=12, **more):
    x, y = zoo_digits(n)
    options = {"eps": 0.1, "steps": 5, "eot_iter": 2, "n_eval": 3, "name": "m"}
    return evaluate(model, x, y, attacks=attacks, **options | more)


@pytest.mark.parametrize("name", ["digits-carso-objective", "digits-atop-pipeline", "noisy", "mine"])
def test_a_defence_that_keeps_its_promise_repeats(name):
    model = NoisyEnsemble(zoo.load("digits-pgd-at"), 0.1, samples=2) if name == "noisy" else Noisy()
    model = zoo.load(name) if name.startswith("digits") else model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        subject = Subject(model.eval(), *zoo_digits(8), batch_size=8, n_eval=2, seed=3)
        assert subject.is_random and subject.can_repeat
        assert not Subject(Noisy("block"), *zoo_digits(8), batch_size=8, n_eval=2, seed=3).can_repeat
        for other in (WithFixedNoise(model), WithoutNoise(model)):
            assert not Subject(other, *zoo_digits(8), batch_size=8, n_eval=2, seed=3).is_random


@pytest.mark.parametrize(("seeds", "quiet"), [("block", True), ("place", True), ("call", False)])
@pytest.mark.parametrize("n", [1, 12])
def test_noise_that_is_not_fixed_is_judged_by_its_draws_or_marked(seeds, quiet, n):
    """Noise that a mode does not switch off is noise, and noise that depends on the batch is found by the probes."""
    model = WithFixedNoise(Noisy(seeds)) if quiet else WithoutNoise(Noisy(quiet=False))
    report = judged(model, [PGD()], n, probes=True)
    if seeds == "place" and n > 1:
        found = {finding.alarm: finding.verdict for finding in report.findings}
        assert found["batch size"] == "unreliable" and not report.headline.reliable
    elif seeds == "place":
        assert report.row("clean").deterministic
    else:
        # Within a block, "block" draws again in a second call only.
        assert report.row("clean").deterministic == (seeds == "block")


def test_a_mode_says_what_it_is_about_alone():
    model = Noisy(sigma=0.5)
    attacks = [AttackSpec(PGD(), through=WithFixedNoise(model), label="through"), PGD(steps=1)]
    deployed, fixed = judged(model, attacks, 48), judged(WithFixedNoise(model), [PGD()], 48)
    right = deployed.row("clean").wrong == 0
    row = deployed.row("through")
    assert fixed.headline.n_eval == 1 and row.n_eval == 3 and row.transferred and not row.own_gradients
    assert fixed.row("PGD-5 ce").robust[right].mean() < row.robust[right].mean() < 1
    rows = [deployed.row(name) for name in ("clean", "through", "PGD-1 ce")]
    assert np.array_equal(deployed.row("worst").right, Points.worst(rows, 48).right)


def test_another_model_vouches_for_no_gradients_of_the_judged_model():
    """The row through fixed noise had gradients; the other, on the model itself, had none."""

    class Masked(Noisy):
        def forward(self, x):
            logits = super().forward(x)
            return logits if self.seed is not None else logits.detach() + 0 * x.sum()

    model = Masked()
    report = judged(model, [AttackSpec(PGD(), through=WithFixedNoise(model), label="through"), PGD()], 24)
    assert report.row("through").reliable and not report.headline.reliable
    assert {f.alarm: f.verdict for f in report.findings}["gradient health"] == "unreliable"


def test_only_attacks_along_own_gradients_can_lack_them():
    """Square needs no gradients, and an attack along those of another model has them."""
    others = [row("Square", [1, 1, 0, 1], kind="square", health=None), row("T", [1, 1, 1, 1], transferred=True)]
    rows = [row("clean", [1, 1, 1, 1], kind="clean", health=None), *others]
    rows += [row(name, [1, 1, 1, 1], health=MASKED) for name in ("A", "B")]
    some = [rows[0], row("A", [1, 0, 1, 1]), row("B", [1, 1, 0, 1]), rows[-1]]
    for given, verdict, begins in (
        (rows, "unreliable", "all 2 attacks along"),
        (rows[:4], "unreliable", "the only attack along"),
        (some, "noted", "1 of 3 attacks along"),
    ):
        health = said(given)["gradient health"]
        assert health.verdict == verdict and health.measured.startswith(begins)


def masked(right, **more):
    """A random model without gradients, whose images fall in some draws, to an attack by other gradients."""
    own = drawn("own", [5] * 8, [0] * 8, health=MASKED, **more)
    other = drawn("other", [right] * 8, [7] * 8, transferred=True, **more)
    return [drawn("clean", [5] * 8, [0] * 8, kind="clean", health=None), own, other]


@pytest.mark.parametrize(("right", "verdict"), [(1, "noted"), (5, "unreliable")])
def test_an_accuracy_of_0_in_all_draws_is_not_doubted(right, verdict):
    """A fifth of the draws is right after the attack, on each image: none is right in all draws."""
    rows = masked(right)
    found = said(rows)
    assert {found[name].verdict for name in ("gradient health", "missed images")} == {verdict}
    report = Report([*rows, *worst_rows(rows)], about={"claim": "10"})
    report.findings = [Finding(**vars(finding) | {"model": "m"}) for finding in found.values()]
    assert (report.headline.accuracy == 0) == (right == 1)
    beside = " ".join(report.to_text().split("m: ")[1].split())
    assert ("unreliable" in beside) == (right == 5)
    # the accuracy of single draws may still be too high, and so may the result of the claim
    told = ("may leave fewer single draws right", "The gradients of the model itself were not usable, so a better")
    assert all((words in beside) == (right == 1) for words in told)
    # Predictions that are inconsistent make every number doubtful.
    wrong = said(rows, probed(8, later_changes=0.5, left=[0] * 8))
    assert wrong["same answer again"].verdict == wrong["gradient health"].verdict == "unreliable"


def test_an_attack_in_another_ball_gives_no_headline():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval(), torch.rand(4, 1, 4, 4)
    with torch.no_grad():
        y = model(x).argmax(1)
    report = evaluate(model, x, y, eps=0.05, attacks=[PGD(eps=0.2, norm="linf", steps=2)], probes=False, claim=50)
    with pytest.raises(ValueError, match="own eps or norm is in another ball"):
        _ = report.headline
    assert "claim" in report.to_text()


def test_few_images_and_draws_have_a_wide_interval():
    """The error has less than one degree of freedom, so its quantile is huge."""
    found = Estimate.of(np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]]))
    low, high = found.interval
    assert found.freedom < 1 and 0 <= low <= found.mean <= high <= 1
