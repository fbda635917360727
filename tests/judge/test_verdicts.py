"""A report misleads nobody: about noise that is not fixed, another model, a doubt, a sign."""

from unittest import mock

import numpy as np
import pytest
import torch
from digit_nets import zoo_digits
from evaluating import evaluate
from reports import MASKED, drawn, probed, row, said
from torch import nn

from purify_fast import zoo
from purify_fast.attacks import PGD
from purify_fast.defences import NoisyEnsemble, WithFixedNoise, WithoutNoise
from purify_fast.evaluation import AttackSpec, Report
from purify_fast.judge.alarms.signs import Evidence, Finding, findings
from purify_fast.judge.request.subject import Subject
from purify_fast.judge.results.rows import by_worst_points, worst_rows


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
    assert np.array_equal(deployed.row("worst").right, by_worst_points(rows, 48).right)


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


@pytest.mark.parametrize(("left", "verdict"), [(13, "noted"), (40, "unreliable")])
def test_draws_that_leave_more_than_the_report_are_no_doubt(left, verdict):
    """Gradients over 16 draws leave 45 % of 64 images, over one draw 64 %; the report leaves 20 or 62 %."""
    probes = probed(eot=[(1.0, 0.64), (16.0, 0.45)])
    rows = [row("clean", np.ones(64), kind="clean"), row("APGD", np.arange(64) < left, kind="apgd")]
    assert said(rows, probes)["noise and seeds"].verdict == verdict


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


def test_signs_of_a_random_model_count_images_and_name_draws():
    rows = [drawn("clean", [4] * 16, [1] * 16, kind="clean"), drawn("A", [4] * 16, [1] * 16, kind="apgd")]
    probes = probed(16, eot=[(1.0, 1.0), (16.0, 15 / 16)], varying=1.0)
    told = said(rows, probes)["noise and seeds"].measured
    assert "over 16 draws leaves 15 of 16 images right in most draws, and with gradients over 1 it leaves 16" in told
    guess = {finding.alarm: finding for finding in findings(Evidence(rows, classes=10))}["better than guessing"]
    assert guess.measured.startswith("80.0 % of the single draws on clean images are classified correctly")
    assert "made at least half more of their draws wrong" in said(masked(5))["missed images"].measured
