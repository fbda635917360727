"""A report is understood from itself: its words, the meaning of its columns, its verdict and its pictures."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluating import evaluate
from reports import drawn, forms, row
from torch import nn

import purify_fast
from purify_fast.attacks import BPDA, PGD, AutoAttack
from purify_fast.evaluation import AttackSpec, Examples, Report, lee_kim_2023
from purify_fast.evaluation.alarms import Finding
from purify_fast.evaluation.results.rows import worst_rows
from purify_fast.evaluation.show.page import html_page, picture_lines

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = {"eps": 0.2, "progress": False, "attacks": [PGD(steps=5)]}


@pytest.fixture(scope="module")
def digits():
    images = purify_fast.load_dataset("digits")
    return purify_fast.zoo.load("digits-pgd-at"), images.x_test[:24].float() / 255, images.y_test[:24]


def joined(text):
    return " ".join(text.split())


# -- words --------------------------------------------------------------------------------------------------------


def test_a_number_of_images_that_there_are_not_is_in_no_name(digits):
    pytest.importorskip("pyautoattack")
    model, x, y = digits
    few = AutoAttack(steps=2, n_queries=2)
    attacks = [AttackSpec(few, max_images=100), AttackSpec(PGD(steps=2), max_images=4)]
    report = evaluate(model, x[:8], y[:8], **QUIET | {"attacks": attacks})
    assert "AutoAttack standard, 2 steps, 2 queries" in report.attacks and "PGD-2 ce, first 4" in report.attacks
    # twice the same attack on all images is one
    twice = [AttackSpec(PGD(steps=2), max_images=most) for most in (8, 100)]
    assert evaluate(model, x[:8], y[:8], **QUIET | {"attacks": twice}).attacks == ["clean", "PGD-2 ce", "worst"]


# -- columns ------------------------------------------------------------------------------------------------------


def test_the_columns_are_what_is_said_of_them():
    """Three predictions each: mean counts single ones, accuracy the images that are right in all."""

    class Flips(nn.Module):
        def forward(self, x):
            sure = x.flatten(1)[:, :2]
            return torch.where(x.mean((1, 2, 3))[:, None] > 0.5, torch.randn(len(x), 2), sure)

    x, y = torch.full((60, 1, 2, 2), 0.25), torch.zeros(60).long()
    x[:, :, 0, 0] += 0.2  # class 0
    x[:30] = 0.75  # guessed anew each time
    clean = evaluate(Flips(), x, y, eps=0.01, attacks=[], n_eval=3).row("clean")
    assert clean.n_eval == 3 and 0.5 <= clean.accuracy < clean.mean < 1
    assert abs(clean.mean - 0.75) < 0.12 and abs(clean.accuracy - (0.5 + 0.5 / 8)) < 0.12


def test_bad_luck_of_several_attacks_does_not_add_up():
    """Each attack leaves every image right in four of five draws, or in all, by luck: so does the row worst."""
    lucky = np.arange(12) % 2
    same = [2] * 12
    rows = [drawn("clean", 4 + lucky, same, kind="clean")]
    rows += [drawn("a", 4 + lucky, same, attacked=12), drawn("b", 5 - lucky, same, attacked=12)]
    rows += worst_rows(rows)
    assert rows[-1].accuracy == 0.5 and rows[-1].mean == 0.9
    for text in forms(Report(rows))[1:]:
        cells = next(line for line in text.splitlines() if re.search(r"\bworst\b.*\b50\.0 ± 14\.4\b", line))
        shown = re.sub(r"</?t[dr][^>]*>|\|", "  ", cells)
        assert re.search(r"50\.0 ± 14\.4\s+90\.0 ± 2\.9\s+5\s", shown), cells


def test_the_attack_of_lee_and_kim_says_how_often_it_is_judged():
    x, y = torch.rand(2, 1, 2, 2), torch.zeros(2).long()

    def noisy(x):
        return torch.randn(len(x), 2) / 10 + torch.tensor([1.0, 0.0])

    spec = lee_kim_2023(0.01)
    attacks = [replace(spec, attack=replace(spec.attack, steps=1, eot_iter=1))]
    for n in (2, 5):
        for text in forms(evaluate(noisy, x, y, eps=0.01, attacks=attacks, n_eval=n, progress=False))[1:]:
            assert f"an image counts only if all of its predictions after the attack are right, here {n} of {n}" in (
                " ".join(text.split())
            )
    plain = evaluate(noisy, x, y, eps=0.01, attacks=[PGD(steps=1)], progress=False)
    assert "Lee & Kim" not in plain.to_text()


# -- the verdict --------------------------------------------------------------------------------------------------


def test_the_verdict_follows_from_the_number_and_from_the_signs(digits):
    model, x, y = digits
    honest = evaluate(model, x, y, **QUIET, name="good").to_text(color=False)
    unsuspicious = (
        "4 of 8 signs of a failed attack were asked, and none of these gives a reason to doubt the number. Not"
    )
    assert "of 24 images are still classified correctly after the attack within L-inf 0.2; without" in honest
    assert f"%. {unsuspicious}" in joined(honest)
    torch.manual_seed(0)
    untrained = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    guessing = evaluate(untrained, x, y, **QUIET | {"eps": 1e-4}, name="raw").to_text(color=False)
    assert "\nthis number says little:\n- better than guessing: " in guessing
    assert (
        "is the model trained" in " ".join(guessing.split())
        and "speaks against" not in guessing
        and "no alarm" not in guessing
    )


@pytest.mark.parametrize(
    ("verdicts", "reliable", "said"),
    [
        ((), True, "of 4 images are still classified correctly under PGD."),
        (("not asked",), True, "of 4 images are still classified correctly under PGD."),
        (
            ("passed", "not asked"),
            True,
            "under PGD.\n1 of 5 signs of a failed attack were asked, and none of these gives a reason to doubt the",
        ),
        (("passed", "noted"), True, "to doubt the number. Noted: a1. Not asked: batch size"),
        (("unreliable",), False, "unreliable: a better attack may leave less:\n- a0: found (row)"),
    ],
)
def test_verdicts(verdicts, reliable, said):
    findings = [Finding(f"a{i}", verdict, "found", "row", "m") for i, verdict in enumerate(verdicts)]
    text = Report([row(reliable=reliable)], findings=findings).to_text(color=False)
    assert joined(said) in joined(text)


def test_a_short_list_of_attacks_says_what_was_not_asked(digits):
    """BPDA alone finds much, and nobody has asked whether something stopped it."""
    model, x, y = digits

    class Rounds(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = model

        def purify(self, x):
            return (x * 7).round() / 7

        def forward(self, x):
            return self.classifier(self.purify(x))

    report = evaluate(Rounds(), x, y, **QUIET | {"attacks": [BPDA(steps=3)]})
    for text in forms(report)[1:]:
        assert "attack along the gradients of BPDA had" in joined(text)
    for text in forms(report):
        text = joined(text)
        assert "Not asked: missed images, batch size, noise and seeds" in text
        assert "Some signs need more questions; in Python, EvaluateConfig(probes=True) asks them." in text
    assert "Several signs of a failed attack were not asked." in joined(forms(report)[2]).split("</section>")[0]
    asked = evaluate(Rounds(), x, y, **QUIET | {"attacks": [BPDA(steps=3)], "probes": True})
    assert not any("which probes=True adds" in text for text in forms(asked))


# -- pictures -----------------------------------------------------------------------------------------------------


def test_the_pictures_are_of_images_that_fell(digits, tmp_path):
    model, x, y = digits
    report = evaluate(model, x, y, **QUIET, out=tmp_path)
    attacked = report.row("PGD-5 ce")
    right = report.row("clean").robust
    fell = right & ~attacked.robust
    assert 0 < fell.sum() < right.sum() and not fell[:8].all()
    for one in (attacked.examples, evaluate(model, x, y, **QUIET, out=tmp_path).row("PGD-5 ce").examples):
        assert np.array_equal(one.labels, y.numpy()[fell][:8]) and one.fell.all()
        said = model(torch.from_numpy(one.adversarial)).argmax(1).numpy()
        assert np.array_equal(one.predicted, said) and (one.predicted != one.labels).all()
    lines = picture_lines(attacked.examples, model)
    assert lines[0][0][1] == f"true class {one.labels[0]}, predicted {one.labels[0]}"
    assert lines[0][1][1] == f"attacked, predicted {one.predicted[0]}" and lines[0][1][2] is False
    # without the model the class after the attack is known all the same
    assert picture_lines(attacked.examples, None)[0][1][1] == lines[0][1][1]


def test_the_picture_shows_what_the_attack_was_judged_by():
    """A random model that is asked again may classify an image that fell correctly."""
    images = np.full((3, 1, 4, 4), 0.5, dtype=np.float32)
    examples = Examples(images, images, np.array([0, 1, 2]), fell=np.ones(3, bool), predicted=np.array([1, 0, -1]))
    captions = [
        [caption for _, caption, _ in line] for line in picture_lines(examples, lambda x: torch.eye(3)[: len(x)])
    ]
    assert [line[0] for line in captions] == [f"true class {c}, predicted {c}" for c in range(3)]
    told = [
        "a picture shows one prediction"
        in html_page(Report([drawn("PGD", [5] * 3, [9] * 3, n_eval=n, examples=examples)]))
        for n in (5, 1)
    ]
    assert told == [True, False]
    said = [line[1] for line in captions]
    assert said == ["attacked, predicted 1", "attacked, predicted 0", "attacked, no class predicted"]


# -- numbers that mislead, colors, titles, representations ------------------------------------------------------------


SHORT = {"eps": 8 / 255, "progress": False, "attacks": [PGD(steps=2)]}


class Broken(nn.Module):
    """Its logits are NaN for bright images."""

    def __init__(self, below: float):
        super().__init__()
        self.below = below

    def forward(self, x):
        logits = torch.zeros(len(x), 3) + x.mean((1, 2, 3))[:, None] * torch.tensor([1.0, 0.0, 0.0])
        return torch.where(x.mean((1, 2, 3))[:, None] < self.below, logits, torch.nan)


def test_nan_is_no_prediction():
    """``argmax`` of NaN is class 0: such a model was 100 % robust on images of class 0."""
    x, y = torch.linspace(0.1, 0.9, 10).view(10, 1, 1, 1).expand(10, 1, 4, 4).contiguous(), torch.zeros(10).long()
    report = evaluate(Broken(-1), x, y, name="m", **SHORT)
    clean = report.row("clean")
    assert clean.accuracy == 0 == report.headline.accuracy and clean.nonfinite_predictions == 10
    assert "10 predictions not finite" in report.to_text() and "10 predictions not finite" in report.to_markdown()
    assert json.loads(report.to_json())["rows"][0]["nonfinite_predictions"] == 10
    half = evaluate(Broken(0.5), x, y, **SHORT).row("clean")
    assert (half.accuracy, half.nonfinite_predictions) == (0.5, 5)
    for logits, decided in (([torch.inf] * 3, 0), ([-torch.inf] * 3, 0), ([torch.inf, 0.0, 1.0], 10), ([0.0] * 3, 10)):
        row = evaluate(lambda x, logits=logits: torch.tensor(logits).expand(len(x), 3), x, y, **SHORT).row("clean")
        assert row.robust.sum() == decided == 10 - row.nonfinite_predictions


def test_nothing_to_attack_is_not_unreliable():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(6, 1, 4, 4)
    with torch.no_grad():
        wrong = (model(x).argmax(1) + 1) % 3
    report = evaluate(model, x, wrong, **SHORT)
    assert report.row("worst").accuracy == 0 and report.row("worst").attacked == 0
    for text in (report.to_text(), report.to_markdown().split("\nn: images")[0]):
        assert "nothing to attack" in text and "unreliable" not in text and "may be lower" not in text
    right = evaluate(model, x, (wrong - 1) % 3, **SHORT)
    assert "nothing to attack" not in right.to_text()
