"""What users stumbled over: numbers that mislead, colors in files, titles that name nothing, long representations."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from purify_fast import __version__
from purify_fast.attacks import PGD
from purify_fast.evaluation import Report, Row, evaluate, merge

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = {"eps": 8 / 255, "progress": False, "attacks": [PGD(steps=2)]}


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
    report = evaluate(Broken(-1), x, y, name="m", **QUIET)
    clean = report.row("clean")
    assert clean.accuracy == 0 == report.headline.accuracy and clean.nonfinite_predictions == 10
    note = (
        "m: 10 of the 10 predictions of clean name no class, because of a NaN or an infinity among their logits; they "
    )
    assert f"{note}count as wrong" in report.notes
    assert "10 predictions not finite" in report.to_text() and "10 predictions not finite" in report.to_markdown()
    assert json.loads(report.to_json())["rows"][0]["nonfinite_predictions"] == 10
    half = evaluate(Broken(0.5), x, y, **QUIET).row("clean")
    assert (half.accuracy, half.nonfinite_predictions) == (0.5, 5)
    for logits, decided in (([torch.inf] * 3, 0), ([-torch.inf] * 3, 0), ([torch.inf, 0.0, 1.0], 10), ([0.0] * 3, 10)):
        row = evaluate(lambda x, logits=logits: torch.tensor(logits).expand(len(x), 3), x, y, **QUIET).row("clean")
        assert row.robust.sum() == decided == 10 - row.nonfinite_predictions


def test_nothing_to_attack_is_not_unreliable():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(6, 1, 4, 4)
    with torch.no_grad():
        wrong = (model(x).argmax(1) + 1) % 3
    report = evaluate(model, x, wrong, **QUIET)
    assert report.row("worst").accuracy == 0 and report.row("worst").settings["attacked"] == 0
    for text in (report.to_text(), report.to_markdown().split("\nn: images")[0]):
        assert "nothing to attack" in text and "unreliable" not in text and "may be lower" not in text
    right = evaluate(model, x, (wrong - 1) % 3, **QUIET)
    assert "nothing to attack" not in right.to_text()


def test_colors_are_for_terminals(monkeypatch, capsys):
    robust = np.array([True, False])
    row = Row("m", "PGD", "pgd", "random", robust, 0.5, 0.5, 1, 0, 0.0, "d", reliable=False)
    report = Report([row])
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033" not in report.to_text()  # pytest reads what is printed: no terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\033[31munreliable" in report.to_text()
    assert "\033" not in report.to_text(color=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in report.to_text() and "\033" in report.to_text(color=True)


def test_the_title_names_what_the_numbers_are_about():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(6, 1, 4, 4), torch.zeros(6).long()
    report = evaluate(model, x, y, dataset_name="mnist", name="a", **QUIET)
    title = report.to_markdown().split("\n")[0]
    assert title == f"# Robustness, L-inf 8/255, mnist, purify_fast {__version__}"
    assert Report.from_json(report.to_json()).about == report.about
    other = evaluate(model, x, y, **QUIET | {"eps": 0.5}, norm="l2", name="b")
    assert other.to_markdown().startswith(f"# Robustness, L2 0.5, purify_fast {__version__}\n")
    # what the two do not have in common is in neither's name
    assert merge([report, other]).to_markdown().startswith(f"# Robustness, purify_fast {__version__}\n")
    assert merge([]).about == {}


def test_representations_are_short():
    robust = np.arange(5000) % 2 == 0
    row = Row("m", "PGD", "pgd", "random", robust, 0.5, 0.5, 1, 0, 0.0, "d", settings={"over": ["a"] * 500})
    assert repr(row) == "Row('m', 'PGD', 50.0 ± 0.7 %, n = 5000)"
    assert repr(Report([row])) == "Report(1 rows of 1 models; lowest: m: 50.0 % under PGD)"
    assert repr(Report()) == "Report(0 rows of 0 models; lowest: no attack)"
