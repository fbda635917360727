from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from purify_fast.demo import arrest, atop, carso
from purify_fast.demo.second_process import SecondProcess
from purify_fast.demo.sentences import percent
from purify_fast.demo.setting import LAYERS
from purify_fast.demo.workspace import AUTOATTACK, BASE, QUICK, STANDARD, Budget, Workspace
from purify_fast.evaluation import Report, Row
from purify_fast.methods.carso import Carso
from purify_fast.training import save_classifier

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
        return report(model, worst=ones(robust), **{AUTOATTACK: ones(auto)}, **rows)

    reports = {
        BASE: made(BASE, 3, 2),
        carso.OBJECTIVE: made(carso.OBJECTIVE, 1, 0, **{carso.PEEL: ones(7)}),
        carso.PIPELINE: made(carso.PIPELINE, 7, 1),
    }
    reports[carso.OBJECTIVE].row(carso.PEEL).reliable = False
    text = "\n".join(carso.conclusion(reports, Budget()))
    assert "seems to withstand 87.5 ± 11.7 %" in text and "unreliable" in text
    assert "+50.0 ± 17.7 points (n = 8, paired), better than its base" in text
    assert "-12.5 ± 11.7 points (n = 8, paired), no significant difference from its base" in text
    reports[carso.OBJECTIVE].row(carso.PEEL).reliable = True
    reports |= {carso.PIPELINE: made(carso.PIPELINE, 0, 0), BASE: made(BASE, 8, 8)}
    text = "\n".join(carso.conclusion(reports, Budget()))
    assert "worse than its base" in text and "believable" in text


def test_atops_sentences_follow_the_numbers():
    numbers = {atop.BEFORE: (2, 1), atop.OBJECTIVE: (8, 1), atop.PIPELINE: (5, 7)}
    reports = {
        name: report(name, **{atop.ALONE: ones(alone), atop.ADAPTIVE: ones(adaptive)})
        for name, (alone, adaptive) in numbers.items()
    }
    before, objective, pipeline, _ = atop.conclusion(reports, Budget())
    assert "25.0 ± 15.3 % when only its classifier is attacked, 12.5 ± 11.7 % when all of it is" in before
    assert "100.0 ± 0.0 % when only" in objective
    assert "+75.0 ± 15.3 points (n = 8, paired), better than before" in objective
    assert "+0.0 ± 0.0 points (n = 8, paired), no significant difference from before" in objective
    assert "+75.0 ± 15.3 points (n = 8, paired), better than before" in pipeline
    assert percent(reports[atop.PIPELINE], atop.ALONE) == "62.5 ± 17.1 %"


def test_arrests_sentences_follow_the_numbers():
    numbers = {STANDARD: (0, 0), BASE: (4, 3), arrest.FINETUNED: (5, 2), arrest.ARREST: (6, 6), arrest.CARSO: (6, 4)}
    reports = {
        name: report(name, worst=ones(worst), **{AUTOATTACK: ones(auto)}) for name, (worst, auto) in numbers.items()
    }
    scratch, finetuned, whole, carso_on_it, _ = arrest.conclusion(reports, Budget())
    assert "50.0 ± 17.7 % under PGD, 37.5 ± 17.1 % under AutoAttack (with clean" in scratch
    assert "AutoAttack -12.5 ± 11.7 points (n = 8, paired), no significant difference from base (PGD-AT)" in finetuned
    assert "AutoAttack +37.5 ± 17.1 points (n = 8, paired), better than base (PGD-AT)" in whole
    assert "against ARREST: clean +0.0 ± 0.0" in carso_on_it and "AutoAttack -25.0 ± 15.3" in carso_on_it


def test_arrests_sums_are_of_one_set_of_images():
    """Clean accuracy on all images is another number."""
    clean, auto = [1, 1, 1, 0, 1, 1, 1, 1], [1, 1, 0, 0]
    rows = {"clean": clean, "worst": ones(2), AUTOATTACK: auto}
    reports = {name: report(name, **rows) for name in arrest.COMPARED}
    text = "87.5 ± 11.7 % of the clean images and withstands 25.0 ± 15.3 % under PGD, 50.0 ± 25.0 % under AutoAttack"
    text += " (with clean accuracy on its 4 images: sum 125.0, NRR 60.0)"
    sentences = arrest.conclusion(reports, Budget())
    assert all(text in sentence for sentence in sentences[:4])


def test_arrests_models_are_compared_under_the_same_attacks(tmp_path):
    pytest.importorskip("pyautoattack")
    few = {"images": 20, "standard_epochs": 2, "steps": 2, "eot": 2}
    few |= {"autoattack_images": 2, "autoattack_steps": 1, "autoattack_queries": 1}
    workspace = Workspace(tmp_path, replace(QUICK, **few), 0, progress=False)
    workspace.train_classifier(STANDARD)
    for name in (BASE, arrest.FINETUNED, arrest.ARREST):
        save_classifier(workspace.classifier(STANDARD), tmp_path / arrest._FOLDERS[name])
    defence = Carso(workspace.classifier(STANDARD), LAYERS, (1, 16, 16), cond_dim=4, latent_dim=2, samples=2)
    folder = tmp_path / arrest._FOLDERS[arrest.CARSO]
    defence.save(folder)
    save_classifier(defence.classifier, folder / "classifier")

    for name in (STANDARD, BASE):
        carso.attack(workspace, name)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("rows/*")}
    reports = {name: arrest.attack(workspace, name) for name in arrest.COMPARED}
    for name in (STANDARD, BASE):  # nothing is attacked twice
        rows = (tmp_path / arrest._FOLDERS[name]).rglob("rows/*")
        assert {path: path.stat().st_mtime_ns for path in rows}.items() <= kept.items()
    for name in arrest.COMPARED[:4]:
        assert reports[name].row("worst").settings["over"] == ["PGD-2 ce", "PGD-2 dlr"]
    for name in arrest.COMPARED[1:]:
        assert reports[name].row(AUTOATTACK).n == 2
    # a random defence is attacked as it is, too, and that counts
    found = reports[arrest.CARSO]
    row = found.row("PGD-2 ce")
    assert row.variant == "random" and row.settings["target"] == "defence" and row.n == 20
    assert "PGD-2 ce" in found.row("worst").settings["over"]


WORK = """
import os, time

def leave(workspace, name):
    (workspace.out / name).write_text(f"{os.getpid()} {workspace.progress}")

def wait(workspace, name):
    while not (workspace.out / name).exists():
        time.sleep(0.01)

def fail(workspace):
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
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "out").mkdir()
    return Workspace(tmp_path / "out", Budget(), 0)


def test_what_the_second_process_has_not_begun_is_done_here(work, workspace):
    with SecondProcess(workspace) as beside:
        beside(work.leave, "first")
        beside(work.wait, "last")  # which only this process can leave
        for name in ("second", "third", "last"):
            beside(work.leave, name)
        work.wait(workspace, "first")
        beside.finish()
    other, quiet = (workspace.out / "first").read_text().split()
    assert int(other) != os.getpid() and quiet == "False"
    assert (workspace.out / "last").read_text() == f"{os.getpid()} True"
    assert {path.name for path in workspace.out.iterdir()} == {"first", "second", "third", "last"}


def test_the_second_process_fails_and_ends_with_the_first(work, workspace):
    with pytest.raises(FloatingPointError, match="lost"), SecondProcess(workspace) as beside:
        beside(work.fail)
        beside.finish()
    with pytest.raises(KeyboardInterrupt), SecondProcess(workspace) as beside:
        beside(work.leave, "first")
        beside(work.wait, "never")
        work.wait(workspace, "first")
        raise KeyboardInterrupt
    assert not multiprocessing.active_children()


def test_work_that_needs_other_work_waits_for_it(work, workspace):
    with SecondProcess(workspace) as beside:
        trained = beside(work.wait, "go")
        beside(work.leave, "made", after=trained)
        (workspace.out / "go").touch()
        beside.finish()
        assert trained.done() and (workspace.out / "made").exists()
    with SecondProcess(workspace) as beside, pytest.raises(FloatingPointError, match="lost"):
        failing = beside(work.fail)
        beside(work.leave, "never", after=failing)
        beside.finish()
    assert not (workspace.out / "never").exists() or (workspace.out / "never").read_text().endswith("False")
