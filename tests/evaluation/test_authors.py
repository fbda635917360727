"""The protocol "authors" repeats how others evaluate: a model of theirs is attacked and judges, in no headline."""

import pytest
from evaluating import evaluate
from small_models import Linear, Made, Purifying, labelled

from purify_fast.attacks import BPDA, PGD, OriginalAutoAttack
from purify_fast.evaluation import AttackSpec, Report
from purify_fast.evaluation.request.attack_lists import AS_A_CLASSIFIER

QUIET = {"eps": 0.05}


def opposite(defence):
    """Another model, which is right where the defence is wrong."""
    return Made(lambda self, x: -self.defence(x), defence=defence)


@pytest.fixture
def trio():
    return labelled(6, classes=5)


def test_a_judge_is_attacked_and_judges_whatever_the_defence_says(trio):
    model, x, _ = trio
    y = model(x).argmin(1)
    row = AttackSpec(PGD(steps=2), label="as somebody", judge=opposite(model))
    report = evaluate(model, x, y, **QUIET | {"eps": 1e-6}, attacks=[row, PGD(steps=3)])
    assert report.row("clean").accuracy == report.headline.accuracy == 0
    judged = report.row("as somebody")
    assert judged.accuracy == 1 and judged.kind == "authors" and judged.attacked == 6
    assert judged.health["gradients"] == 12 and judged.settings["judge"] == "Made"
    strong = evaluate(model, x, y, **QUIET | {"eps": 1.0}, attacks=[row])
    assert strong.row("as somebody").accuracy == 0


def test_bpda_replaces_the_gradient_of_the_judges_purifier(trio):
    model, x, y = trio

    judge, deployed = (Purifying(model, lambda images: images.detach() + 0 * images) for _ in "12")
    rows = [AttackSpec(kind(steps=5), label=f"as {kind.kind}", judge=judge) for kind in (PGD, BPDA)]
    report = evaluate(deployed, x, y, **QUIET | {"eps": 0.5}, attacks=rows)
    exact, straight = report.row("as pgd"), report.row("as bpda")
    assert exact.health["zero"] == exact.health["gradients"] and exact.accuracy > 0
    assert straight.health["zero"] == 0 and straight.accuracy == 0


def test_its_rows_are_in_no_headline_and_no_worst(trio, tmp_path):
    model, x, y = trio
    theirs = AttackSpec(PGD(steps=20), label="as somebody", judge=opposite(model))
    report = evaluate(model, x, y, **QUIET | {"eps": 1e-6}, attacks=[theirs, PGD(steps=2)], out=tmp_path)
    assert report.row("as somebody").accuracy == 0 and report.row("worst").settings["over"] == ["PGD-2 ce"]
    assert report.headline.accuracy == 1 and report.row("PGD-2 ce").attacked == 6
    kept = evaluate(model, x, y, **QUIET | {"eps": 1e-6}, attacks=[theirs], out=tmp_path)
    assert kept.row("as somebody").seconds == report.row("as somebody").seconds
    for found in (kept, Report.from_json(kept.to_json())):
        assert found.headlines == {} and "worst" not in found.attacks


@pytest.mark.slow
def test_a_plain_classifier_is_judged_by_autoattack_alone(trio):
    pytest.importorskip("pyautoattack")
    model, x, y = trio
    report = evaluate(model, x, y, **QUIET, protocol="authors", base=Linear(48, classes=5))
    assert report.attacks == ["clean", AS_A_CLASSIFIER] and report.headlines == {}
    own = evaluate(model, x, y, **QUIET, attacks=[OriginalAutoAttack()]).row("AutoAttack standard")
    row = report.row(AS_A_CLASSIFIER)
    assert 0 < own.accuracy < 1 and row.robust.tolist() == own.robust.tolist()
    assert report.about["protocol"] == "authors" and "defence" not in report.curves
