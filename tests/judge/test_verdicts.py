"""A report misleads nobody: about a variant that is none, a number of a mode that nobody deploys, a doubt, a sign."""

import html
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from digit_nets import zoo_digits
from evaluating import evaluate
from reports import MASKED, drawn, forms, probed, row, said
from torch import nn

from purify_fast import zoo
from purify_fast.attacks import PGD
from purify_fast.defences import NoisyEnsemble
from purify_fast.evaluation import AttackSpec, Report
from purify_fast.judge.alarms.signs import BY_BPDA, Evidence, Finding, findings
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


@pytest.mark.parametrize(
    ("seeds", "wrong"), [("block", "two calls give different logits"), ("place", "depend on its place in the batch")]
)
@pytest.mark.parametrize("n", [1, 12])
def test_noise_that_is_not_fixed_is_not_attacked_as_fixed(seeds, wrong, n):
    report = judged(Noisy(seeds), [PGD(), AttackSpec(PGD(), "fixed")], n)
    assert report.attacks == ["clean", "PGD-5 ce", "worst"]
    note = report.notes[0]
    assert note.startswith("m: PGD-5 ce, fixed noise was left out: within a block of fixed_noise(seed), ")
    assert wrong in note
    report = judged(Noisy(quiet=False), [AttackSpec(PGD(), "deterministic")], n)
    assert report.attacks == ["clean"] and "within a block of deterministic(), two calls" in report.notes[0]


@pytest.mark.parametrize("name", ["digits-carso-objective", "digits-atop-pipeline", "noisy", "mine"])
def test_no_defence_that_keeps_its_promise_is_refused(name):
    model = NoisyEnsemble(zoo.load("digits-pgd-at"), 0.1, samples=2) if name == "noisy" else Noisy()
    model = zoo.load(name) if name.startswith("digits") else model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        subject = Subject(model.eval(), *zoo_digits(8), batch_size=8, n_eval=2, seed=3)
        assert subject.is_random and subject.fault("fixed") is None and subject.fault("deterministic") is None


def test_the_headline_is_the_deployed_defences():
    plan = [AttackSpec(PGD(), "fixed"), AttackSpec(PGD(loss="dlr"), "fixed"), PGD(steps=1)]
    report = judged(Noisy(sigma=0.5), plan, 48)
    of = {row.attack: row for row in report.rows}
    fixed, tried = of["PGD-5 ce, fixed noise"], of["PGD-5 ce, fixed noise, tried on the deployed defence"]
    assert fixed.variant == "fixed" and fixed.n_eval == 1 and tried.variant == "random" and tried.n_eval == 3
    right = of["clean"].wrong == 0
    assert fixed.robust[right].mean() < tried.robust[right].mean() < 1
    deployed = [row for row in report.rows if row.kind == "pgd" and row.variant == "random"]
    assert len(deployed) == 3
    assert np.array_equal(of["worst"].right, by_worst_points([of["clean"], *deployed], 48).right)
    assert of["worst, fixed"].settings["over"] == ["PGD-5 ce, fixed noise", "PGD-5 dlr, fixed noise"]
    # no row of the variant, whatever it left
    assert report.headline is of["worst"] and of["worst"].variant == "random"
    assert all(f"{100 * of['worst, fixed'].accuracy:.1f} ± " in text for text in forms(report))


def test_a_variant_vouches_for_no_gradients_of_the_deployed_defence():
    """The row on fixed noise had gradients; the other, on the deployed defence, had none."""

    class Masked(Noisy):
        def forward(self, x):
            logits = super().forward(x)
            return logits if self.seed is not None else logits.detach() + 0 * x.sum()

    report = judged(Masked(), [AttackSpec(PGD(), "fixed"), PGD()], 24)
    assert report.row("PGD-5 ce, fixed noise").reliable and not report.headline.reliable
    assert {f.alarm: f.verdict for f in report.findings}["gradient health"] == "unreliable"


def test_both_rows_of_a_variant_are_kept(tmp_path, monkeypatch):
    plan = [AttackSpec(PGD(), "deterministic"), AttackSpec(PGD(loss="dlr"), "deterministic", survivors_only=True)]
    model = NoisyEnsemble(zoo.load("digits-pgd-at"), 0.3, samples=1)
    first = judged(model, plan, 24, out=tmp_path)
    searched = []
    monkeypatch.setattr(PGD, "search", lambda self, *a, original=PGD.search: searched.append(1) or original(self, *a))
    again = judged(model, plan, 24, out=tmp_path)
    del first.about["passes"]
    again.about |= {name: first.about[name] for name in ("seconds", "peak_memory")}
    assert again.to_json() == first.to_json() and not searched
    # as an end between the two rows leaves them
    files = [path for path in Path(tmp_path, "rows").iterdir() if b"noise off" in path.read_bytes()]
    assert len(files) == 2
    files[0].unlink()
    again = judged(model, plan, 24, out=tmp_path)
    assert len(searched) == 1
    assert [r.robust.tolist() for r in again.rows] == [r.robust.tolist() for r in first.rows]


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
    text, _, page = forms(report)
    beside = text.split("m: ")[1]
    assert ("unreliable" in beside) == ('class="card bad"' in page) == (right == 5)
    # the accuracy of single draws may still be too high, and so may the result of the claim
    told = ("may leave fewer single draws right", "The gradients of the model itself were not usable, so a better")
    assert all((words in " ".join(beside.split())) == (right == 1) for words in told)
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


def test_an_advice_stands_once_in_each_form():
    rows = [row("clean", [1] * 8, kind="clean"), row("A", [1] * 8, health=MASKED), row("B", [0] * 8, transferred=True)]
    rows.append(row("worst", [1] * 8, kind="worst", reliable=False))
    advice = {"gradient health": f"look for rounding; {BY_BPDA}", "missed images": BY_BPDA}
    doubts = [Finding(name, "unreliable", "much", model="m", advice=words) for name, words in advice.items()]
    for text in forms(Report(rows, findings=doubts)):
        text = " ".join(html.unescape(text).split())
        assert all(text.count(clause) == 1 for clause in advice["gradient health"].split("; ")), text
        assert text.lower().count("what to do") == 1
    # Without a headline, the page has the advice in its table.
    assert forms(Report(rows[:1], findings=doubts))[2].count("look for rounding") == 1
