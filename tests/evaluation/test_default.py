"""Without options `evaluate` runs the protocol "standard" with its signs, on an installation without AutoAttack."""

import json
import sys

import pytest
import torch

import purify_fast
from purify_fast import cli
from purify_fast.attacks import AutoAttack
from purify_fast.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

STANDARD = [
    "APGD-10 margin",
    *(f"{name}, nearest first" for name in ("APGD-T 30", "APGD-30 ce", "APGD-T 30 margin", "FAB-T 100", "Square")),
]


@pytest.fixture
def without_autoattack(monkeypatch):
    for package in ("pyautoattack", "autoattack"):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.fixture
def digits():
    images = purify_fast.load_dataset("digits")
    return images.x_test[:6].float() / 255, images.y_test[:6]


def test_the_default_is_standard_with_its_signs(without_autoattack, digits):
    model, base = purify_fast.zoo.load("digits-pgd-at"), purify_fast.zoo.load("digits-standard")
    report = evaluate(model, *digits, eps=0.1, steps=30, base=base, progress=False)
    assert report.attacks == ["clean", *STANDARD, "transfer from the base", "worst"]
    assert report.about["protocol"] == "standard" and sum(f.verdict != "not asked" for f in report.findings) >= 12
    # before any work
    for missing in ({"protocol": "official"}, {"protocol": "authors"}, {"attacks": [AutoAttack()]}):
        with pytest.raises(ModuleNotFoundError, match=r"AutoAttack is not installed.*purify-fast\[eval\]"):
            evaluate(lambda x: pytest.fail("it was asked"), *digits, eps=0.1, **missing, progress=False)


def test_the_command_without_options_runs_the_same(without_autoattack, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    words = ["evaluate", "zoo:digits-pgd-at", "--images", "4", "--steps", "30", "--device", "cpu"]
    assert cli.main(words) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "runs/zoo/digits-pgd-at/evaluation/report.json").read_text())
    assert [row["attack"] for row in found["rows"]] == ["clean", *STANDARD, "worst"]
    assert found["about"]["protocol"] == "standard"
