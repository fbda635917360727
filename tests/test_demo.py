from __future__ import annotations

import multiprocessing
import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from purify_fast import demo
from purify_fast.demo import arrest, atop, carso
from purify_fast.demo.common import BASE, STANDARD, Budget, Place, percent
from purify_fast.evaluation import Report, Row

N = 8


def ones(n: int) -> list[int]:
    return [1] * n + [0] * (N - n)


def report(model: str, **rows: list[int]) -> Report:
    made = Report()
    for attack, mask in {"clean": ones(N), **rows}.items():
        robust = np.array(mask, dtype=bool)
        made.rows.append(Row(model, attack, "x", "random", robust, robust.mean(), robust.mean(), 1, 0, 0.0, "d"))
    return made


def test_carsos_sentences_follow_the_numbers():
    def made(model: str, robust: int, auto: int, **rows: list[int]) -> Report:
        return report(model, worst=ones(robust), **{carso.AUTOATTACK: ones(auto)}, **rows)

    reports = {
        BASE: made(BASE, 3, 2),
        carso.PUBLISHED: made(carso.PUBLISHED, 1, 0, **{carso.PEEL: ones(7)}),
        carso.PIPELINE: made(carso.PIPELINE, 7, 1),
    }
    reports[carso.PUBLISHED].row(carso.PEEL).reliable = False
    text = "\n".join(carso.conclusion(reports, Budget()))
    assert "seems to withstand 87.5 ± 11.7 %" in text and "unreliable" in text
    assert "+50.0 ± 17.7 points (n = 8, paired), better than its base" in text
    assert "-12.5 ± 11.7 points (n = 8, paired), not told from its base" in text
    reports[carso.PUBLISHED].row(carso.PEEL).reliable = True
    reports |= {carso.PIPELINE: made(carso.PIPELINE, 0, 0), BASE: made(BASE, 8, 8)}
    text = "\n".join(carso.conclusion(reports, Budget()))
    assert "worse than its base" in text and "believable" in text


def test_atops_sentences_follow_the_numbers():
    numbers = {atop.BEFORE: (2, 1), atop.PUBLISHED: (8, 1), atop.PIPELINE: (5, 7)}
    reports = {
        name: report(name, **{atop.ALONE: ones(alone), atop.ADAPTIVE: ones(adaptive)})
        for name, (alone, adaptive) in numbers.items()
    }
    before, published, pipeline, _ = atop.conclusion(reports, Budget())
    assert "25.0 ± 15.3 % when only its classifier is attacked, 12.5 ± 11.7 % when all of it is" in before
    assert "100.0 ± 0.0 % when only" in published
    assert "+75.0 ± 15.3 points (n = 8, paired), better than before" in published
    assert "+0.0 ± 0.0 points (n = 8, paired), not told from before" in published
    assert "+75.0 ± 15.3 points (n = 8, paired), better than before" in pipeline
    assert percent(reports[atop.PIPELINE], atop.ALONE) == "62.5 ± 17.1 %"


def test_arrests_sentences_follow_the_numbers():
    numbers = {STANDARD: (0, 0), BASE: (4, 3), arrest.FINETUNED: (5, 2), arrest.ARREST: (6, 6), arrest.CARSO: (6, 4)}
    reports = {
        name: report(name, worst=ones(worst), **{arrest.AUTOATTACK: ones(auto)})
        for name, (worst, auto) in numbers.items()
    }
    scratch, finetuned, whole, carso_on_it, _ = arrest.conclusion(reports, Budget())
    assert "50.0 ± 17.7 % under PGD, 37.5 ± 17.1 % under AutoAttack (sum 137.5, NRR 54.5)" in scratch
    assert "AutoAttack -12.5 ± 11.7 points (n = 8, paired), not told from base (PGD-AT)" in finetuned
    assert "AutoAttack +37.5 ± 17.1 points (n = 8, paired), better than base (PGD-AT)" in whole
    assert "against ARREST: clean +0.0 ± 0.0" in carso_on_it and "AutoAttack -25.0 ± 15.3" in carso_on_it


WORK = """
import os, time

def leave(place, name):
    (place.out / name).write_text(f"{os.getpid()} {place.progress}")

def wait(place, name):
    while not (place.out / name).exists():
        time.sleep(0.01)

def fail(place):
    raise FloatingPointError("lost")
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Functions that a second process can import."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "work_of_the_demos_test.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield import_module("work_of_the_demos_test")
    sys.modules.pop("work_of_the_demos_test")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "out").mkdir()
    return Place(tmp_path / "out", Budget(), 0)


def test_what_the_second_process_has_not_begun_is_done_here(work, place):
    with demo._Beside(place) as beside:
        beside(work.leave, "first")
        beside(work.wait, "last")  # which only this process can leave
        for name in ("second", "third", "last"):
            beside(work.leave, name)
        work.wait(place, "first")
        beside.finish()
    other, quiet = (place.out / "first").read_text().split()
    assert int(other) != os.getpid() and quiet == "False"
    assert (place.out / "last").read_text() == f"{os.getpid()} True"
    assert {path.name for path in place.out.iterdir()} == {"first", "second", "third", "last"}


def test_the_second_process_fails_and_ends_with_the_first(work, place):
    with pytest.raises(FloatingPointError, match="lost"), demo._Beside(place) as beside:
        beside(work.fail)
        beside.finish()
    with pytest.raises(KeyboardInterrupt), demo._Beside(place) as beside:
        beside(work.leave, "first")
        beside(work.wait, "never")
        work.wait(place, "first")
        raise KeyboardInterrupt
    assert not multiprocessing.active_children()


def test_work_that_needs_other_work_waits_for_it(work, place):
    with demo._Beside(place) as beside:
        trained = beside(work.wait, "go")
        beside(work.leave, "made", after=trained)
        (place.out / "go").touch()
        beside.finish()
        assert trained.done() and (place.out / "made").exists()
    with demo._Beside(place) as beside, pytest.raises(FloatingPointError, match="lost"):
        failing = beside(work.fail)
        beside(work.leave, "never", after=failing)
        beside.finish()
    assert not (place.out / "never").exists() or (place.out / "never").read_text().endswith("False")
