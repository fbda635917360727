"""A report is understood from itself: its words, the meaning of its columns, its verdict and its pictures."""

import json

import numpy as np
import torch
from digit_nets import zoo_digits
from evaluating import evaluate
from small_models import labelled

import purify_fast
from purify_fast.attacks import PGD
from purify_fast.judge.show.page import picture_lines

QUIET = {"eps": 0.2, "attacks": [PGD(steps=5)]}


def test_the_pictures_are_of_images_that_fell(tmp_path):
    model, (x, y) = purify_fast.zoo.load("digits-pgd-at"), zoo_digits(24)
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


SHORT = {"eps": 8 / 255, "attacks": [PGD(steps=2)]}


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
