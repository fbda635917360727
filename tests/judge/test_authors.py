"""A repeated evaluation of others: a model of theirs is attacked and judges, in no headline."""

from functools import partial

import pytest
from evaluating import evaluate
from small_models import Made, labelled

from purify_fast.attacks import PGD
from purify_fast.evaluation import AttackSpec, Report
from purify_fast.judge.request.config import EvaluateConfig

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


def test_the_protocol_says_where_the_evaluations_are():
    """A name of earlier versions, for which the repository has the evaluations still."""
    for asked in (EvaluateConfig, partial(evaluate, None, None, None, **QUIET)):
        with pytest.raises(ValueError, match=r"protocol must be one of fast, .*, got 'authors': .*robustness/authors"):
            asked(protocol="authors")
