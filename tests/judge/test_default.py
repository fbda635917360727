"""Without options `evaluate` runs the protocol "standard" with its signs, on an installation without AutoAttack."""

import pytest
from digit_nets import zoo_digits
from evaluating import evaluate

import purify_fast
from purify_fast import cli
from purify_fast.attacks import PGD, OriginalAutoAttack
from purify_fast.evaluation import EvaluateConfig

STANDARD = [
    "APGD-10 margin",
    "APGD-T 30 margin",
    "APGD-30 ce",
    "APGD-T 30",
    "Square, 1000 queries",
    "FAB-T 100, all targets, 20 nearest",
    "APGD-T 30 margin, all targets x2, 10 nearest",
    "APGD-30 ce x20, 10 nearest",
    "Square, 10 nearest",
]


@pytest.mark.slow
def test_the_default_is_standard_with_its_signs(without_autoattack):
    model, base = purify_fast.zoo.load("digits-pgd-at"), purify_fast.zoo.load("digits-standard")
    report = evaluate(model, *zoo_digits(6), eps=0.1, steps=30, base=base)
    assert report.attacks == ["clean", *STANDARD, "transfer from the base", "worst"]
    assert report.about["protocol"] == "standard" and sum(f.verdict != "not asked" for f in report.findings) >= 6
    # before any work
    for missing in ({"protocol": "official"}, {"attacks": [OriginalAutoAttack()]}):
        with pytest.raises(ModuleNotFoundError, match=r"AutoAttack is not installed.*purify-fast\[eval\]"):
            evaluate(lambda x: pytest.fail("it was asked"), *zoo_digits(6), eps=0.1, **missing)


def test_the_command_without_options_asks_for_the_same(without_autoattack, tmp_path, monkeypatch, capsys):
    """The command asks for the protocol `standard` with its signs, and changes nothing else that decides the rows."""
    asked = []

    original = purify_fast.evaluation.evaluate

    def spy(model, x, y, **options):
        asked.append(options)
        return original(model, x, y, **options | {"attacks": [PGD(steps=1)], "probes": False})

    monkeypatch.setattr("purify_fast.evaluation.evaluate", spy)
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "zoo:digits-pgd-at", "--images", "4", "--steps", "30", "--device", "cpu"]
    assert cli.main(words) == 0, capsys.readouterr().err
    (options,) = asked
    assert options["config"] == EvaluateConfig(steps=30, dataset_name="digits") and options.get("attacks") is None
    assert (tmp_path / "runs/zoo/digits-pgd-at/evaluation/report.json").is_file()
