"""The check of a GPU, rehearsed on the CPU: sections, their limits and failures, what a second run does."""

import functools
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import torch
from small_runs import attack, batch, classifier_task

from benchmarks import __main__ as program
from benchmarks.gpu import goals, gpu_check, gpu_lease, gpu_sections, in_use
from benchmarks.speed import limits, pipelines, sheets, timing
from benchmarks.speed.pipelines import pgd_forms
from purify_fast.speed import StepGraphs

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")


def check(*arguments: str, command: str = "gpu_check") -> int:
    with pytest.raises(SystemExit) as end:
        program.main([command, *arguments])
    return int(end.value.code)


def states(folder: Path) -> dict[str, str]:
    return {path.stem: json.loads(path.read_text())["state"] for path in (folder / "gpu_check").glob("*.json")}


@pytest.mark.slow
def test_sections_write_rows_and_keep_them_if_they_are_asked_to(tmp_path, capsys, forking):
    arguments = ("measured", "--rehearse", "--out", str(tmp_path), "--only", "standard", "limits")
    assert check(*arguments) == 0 and states(tmp_path) == {"standard": "passed", "limits": "passed"}
    assert {row["limit"] for row in sheets.read_csv(tmp_path / limits.FILE)} == {limits.COPY, limits.PRODUCT}
    said = capsys.readouterr().out
    assert "| standard | passed |" in said and "| standard | passed |" in (tmp_path / "measured.md").read_text()
    with tarfile.open(tmp_path / "measured.tar.xz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {limits.FILE, gpu_sections.STANDARD, "measured.md", "gpu_check/limits.json"} <= names
    assert "gpu_check/limits.outcome" not in names
    # a part that is missing is measured, and nothing else
    rows = sheets.read_csv(tmp_path / gpu_sections.STANDARD)
    kept = [row for row in rows if row["part"] == "graphs auto"]
    sheets.write_csv(tmp_path / gpu_sections.STANDARD, kept)
    assert check(*arguments, "--resume") == 0
    again = sheets.read_csv(tmp_path / gpu_sections.STANDARD)
    assert again[: len(kept)] == kept and {row["part"] for row in again[len(kept) :]} == {"graphs off"}


@pytest.mark.slow
def test_a_section_that_fails_stops_no_other(tmp_path, monkeypatch, forking):
    """The first raises an error, the second does not end and keeps its row, and the third dies."""

    def bad(context):
        raise ValueError("what went wrong")

    def endless(context):
        work = {"first": lambda: {"ms": "1"}, "second": lambda: time.sleep(600)}
        return gpu_sections.measured(context, gpu_sections.STANDARD, work)

    sections = {"pgd": (bad, 300.0), "limits": (endless, 7.0)}
    sections["kernels"] = (lambda _: os._exit(3), 300.0)
    for name, (run, limit) in sections.items():
        monkeypatch.setitem(gpu_sections.SECTIONS, name, gpu_sections.Section("measured", run, (limit, limit)))
    monkeypatch.setitem(gpu_check.CALLS, "measured", gpu_check.Call((900, 900), False))
    assert check("measured", "--rehearse", "--out", str(tmp_path), "--only", *sections) == 1
    assert states(tmp_path) == dict.fromkeys(sections, "failed")
    page = (tmp_path / "measured.md").read_text()
    assert "ValueError: what went wrong" in page and "Traceback" in page
    assert "was killed at its limit of 7 s" in page and "exit status 3" in page
    (row,) = sheets.read_csv(tmp_path / gpu_sections.STANDARD)
    assert (row["part"], row["rehearsal"]) == ("first", "True")


def test_on_a_gpu_a_row_without_a_replay_of_a_graph_has_failed(monkeypatch):
    rows = [in_use.row("fit", torch.device("cuda"), seen, []) for seen in ([], [None])]
    assert [row["verdict"] for row in rows] == ["failed", "right"]
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)
    with in_use.replays() as seen:
        for _ in range(2):
            torch.cuda.CUDAGraph.replay(None)
    assert len(seen) == 2


def test_a_step_that_was_refused_is_not_called_captured(rerun, monkeypatch):
    with pytest.raises(RuntimeError, match="the attack of the training step was not captured"):
        pipelines.training_step(classifier_task(attack=attack()), batch(), compiled=False, captured=True)()
    monkeypatch.setattr(pipelines, "StepGraphs", lambda mode: StepGraphs(mode, capture=rerun))
    step = pipelines.training_step(classifier_task(attack=attack()), batch(), compiled=False, captured=True)
    assert step().isfinite()
    rerun.error = RuntimeError("operation not permitted")
    with pytest.raises(RuntimeError, match="the attack of the training step was not"), pytest.warns(UserWarning):
        pipelines.training_step(classifier_task(attack=attack()), batch(), compiled=False, captured=True)()


@pytest.fixture
def rehearsal(tmp_path):
    (tmp_path / "gpu_check" / "standard").mkdir(parents=True)
    return gpu_sections.Context(tmp_path, CPU, True, 600.0)


FORMS = [name for name in pgd_forms.forms(1) if "compile" not in name]


@pytest.mark.slow
def test_forms_of_pgd_have_rows_and_a_weaker_form_is_seen(rehearsal, monkeypatch, forking):
    forms = pgd_forms.forms
    monkeypatch.setattr(pgd_forms, "forms", lambda count: {name: forms(count)[name] for name in FORMS})
    assert len(forms(1)) == 8
    outcome = gpu_sections.forms_of_pgd(rehearsal)
    assert outcome.state == "passed" and not outcome.left_out, outcome
    rows = sheets.read_csv(rehearsal.out / gpu_sections.PGD)
    assert [(row["form"], row["images"], row["verdict"]) for row in rows] == [(name, "8", "right") for name in FORMS]
    for row in rows:
        assert abs(float(row["images_per_s"]) * float(row["ms"]) / 8000 - 1) < 0.05
    weak = functools.partial(pgd_forms.PGD, steps=2)
    monkeypatch.setattr(pgd_forms, "PGD", lambda steps, **how: weak(**how))
    (rehearsal.out / gpu_sections.PGD).unlink()
    outcome = gpu_sections.forms_of_pgd(rehearsal)
    assert outcome.state == "failed"
    assert outcome.details["errors"] == {f"8 images, {name}": "wrong" for name in FORMS if "ours" in name}


def lease(*arguments: str) -> int:
    return check(*arguments, "--rehearse", command="gpu_lease")


def test_a_lease_writes_marked_rows_and_names_device_and_commit(tmp_path, monkeypatch, capsys, forking):
    part = f"ARREST step, {goals.UNRACED}"
    monkeypatch.setattr(goals, "PARTS", {part: goals.PARTS[part]})
    assert lease("goals", "--out", str(tmp_path), "--archives", str(tmp_path / "back")) == 0
    (row,) = sheets.read_csv(tmp_path / gpu_sections.GOALS)
    assert (row["part"], row["verdict"], row["rehearsal"]) == (part, "right", "True") and float(row["ms"]) > 0
    assert timing.REHEARSAL is False
    said = capsys.readouterr().out
    commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"{row['device']}, commit {commit.strip()}" in said and "| goals | passed |" in said
    assert f"{goals.COMPILING:5d}  all compilations, side by side" in said
    assert [file.name for file in (tmp_path / "back").iterdir()] == ["goals.tar.xz"]


def test_the_lease_measures_each_goal_in_each_form_within_its_time():
    """By the seconds that parts are assumed to take, once their code is in the compiler's cache."""
    for goal in (goals.PGD, *goals.PIPELINES):
        forms = {part.partition(", ")[2] for part in goals.PARTS if part.startswith(f"{goal}, ")}
        assert forms == {goals.RACED, goals.COMPILED, goals.UNRACED, "expert", "expert, compiled", goals.PLAIN}
    _, seconds, (section,) = gpu_lease.STAGES["goals"]
    limit = min(gpu_sections.SECTIONS[section].limits[0], seconds - gpu_check.CLOSING[0]) - gpu_check.GRACE[0]
    assert seconds <= gpu_check.CALLS[section].seconds[0] == 420
    assert list(dict(goals.plan()))[1:] == list(goals.PARTS) and goals.plan()[-1][1] <= limit
    assert max(goals.FORMS.values()) < goals.MOST_SECONDS[0] == goals.COMPILING == 120


def test_a_part_that_raises_or_differs_is_reported(rehearsal, monkeypatch, forking):
    """Each part has its own process: it may raise, or give other numbers than the first form."""

    def numbers(factor):
        row = {"goal": "a", "form": "b", "verdict": "right"}
        return lambda device, quick: (dict(row), factor * torch.ones(3, dtype=torch.float64))

    parts = {"raises": lambda *_: 1 / 0, "first": numbers(1), "near": numbers(1.04), "far": numbers(1.06)}
    monkeypatch.setattr(goals, "PARTS", parts)
    results: dict[str, torch.Tensor] = {}
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        goals.row_of("raises", rehearsal, results)
    verdicts = [goals.row_of(part, rehearsal, results)["verdict"] for part in ("first", "near", "far")]
    assert verdicts == ["right", "right", "wrong"]
