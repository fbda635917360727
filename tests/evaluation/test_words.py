"""A report is understood from itself: its words, the meaning of its columns, its verdict and its pictures."""

import json
import re

import numpy as np
import pytest
import torch
from evaluating import evaluate
from reports import drawn, forms
from small_models import labelled

import purify_fast
from purify_fast.attacks import PGD, AutoAttack
from purify_fast.evaluation import AttackSpec, Examples, Report
from purify_fast.evaluation.results.rows import worst_rows
from purify_fast.evaluation.show.page import picture_lines

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = {"eps": 0.2, "progress": False, "attacks": [PGD(steps=5)]}


@pytest.fixture(scope="module")
def digits():
    images = purify_fast.load_dataset("digits")
    return purify_fast.zoo.load("digits-pgd-at"), images.x_test[:24].float() / 255, images.y_test[:24]


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


def test_the_columns_are_what_is_said_of_them():
    """Three predictions each: mean counts single ones, accuracy the images that are right in all."""

    def flips(x):
        return torch.where(x.mean((1, 2, 3))[:, None] > 0.5, torch.randn(len(x), 2), x.flatten(1)[:, :2])

    x, y = torch.full((60, 1, 2, 2), 0.25), torch.zeros(60).long()
    x[:, :, 0, 0] += 0.2  # class 0
    x[:30] = 0.75  # guessed anew each time
    clean = evaluate(flips, x, y, eps=0.01, attacks=[], n_eval=3).row("clean")
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
    lines = picture_lines(examples, lambda x: torch.eye(3)[: len(x)])
    captions = [[caption for _, caption, _ in line] for line in lines]
    assert [line[0] for line in captions] == [f"true class {c}, predicted {c}" for c in range(3)]
    said = [line[1] for line in captions]
    assert said == ["attacked, predicted 1", "attacked, predicted 0", "attacked, no class predicted"]


SHORT = {"eps": 8 / 255, "progress": False, "attacks": [PGD(steps=2)]}


def broken(below):
    """A model whose logits are NaN for bright images."""

    def model(x):
        level = x.mean((1, 2, 3))[:, None]
        return torch.where(level < below, level * torch.tensor([1.0, 0.0, 0.0]), torch.nan)

    return model


def test_nan_is_no_prediction():
    """``argmax`` of NaN is class 0: such a model was 100 % robust on images of class 0."""
    x, y = torch.linspace(0.1, 0.9, 10).view(10, 1, 1, 1).expand(10, 1, 4, 4).contiguous(), torch.zeros(10).long()
    report = evaluate(broken(-1), x, y, name="m", **SHORT)
    clean = report.row("clean")
    assert clean.accuracy == 0 == report.headline.accuracy and clean.nonfinite_predictions == 10
    assert json.loads(report.to_json())["rows"][0]["nonfinite_predictions"] == 10
    half = evaluate(broken(0.5), x, y, **SHORT).row("clean")
    assert (half.accuracy, half.nonfinite_predictions) == (0.5, 5)
    for logits, decided in (([torch.inf] * 3, 0), ([-torch.inf] * 3, 0), ([torch.inf, 0.0, 1.0], 10), ([0.0] * 3, 10)):
        row = evaluate(lambda x, logits=logits: torch.tensor(logits).expand(len(x), 3), x, y, **SHORT).row("clean")
        assert row.robust.sum() == decided == 10 - row.nonfinite_predictions


def test_nothing_to_attack_is_not_unreliable():
    model, x, y = labelled(6)
    report = evaluate(model, x, (y + 1) % 10, **SHORT)
    assert report.row("worst").accuracy == 0 and report.row("worst").attacked == 0
    for text in (report.to_text(), report.to_markdown().split("\nn: images")[0]):
        assert "nothing to attack" in text and "unreliable" not in text
    assert "nothing to attack" not in evaluate(model, x, y, **SHORT).to_text()
