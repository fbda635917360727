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
from benchmarks.speed import limits, pipelines, running, sheets, timing
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
    arguments = ("measured", "--rehearse", "--out", str(tmp_path), "--only", "captures", "limits")
    assert check(*arguments) == 0
    assert states(tmp_path) == {"captures": "passed", "limits": "passed"}
    assert {row["limit"] for row in sheets.read_csv(tmp_path / limits.FILE)} == {limits.COPY, limits.PRODUCT}
    assert {row["captured"] for row in sheets.read_csv(tmp_path / gpu_sections.CAPTURE_COST)} == {"False"}
    said = capsys.readouterr().out
    assert "| captures | passed |" in said and "| captures | passed |" in (tmp_path / "measured.md").read_text()
    with tarfile.open(tmp_path / "measured.tar.xz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {limits.FILE, gpu_sections.CAPTURE_COST, "measured.md", "gpu_check/limits.json"} <= names
    assert "gpu_check/limits.outcome" not in names
    # a row of which a part is missing is measured, and nothing else
    rows = sheets.read_csv(tmp_path / gpu_sections.CAPTURE_COST)
    sheets.write_csv(tmp_path / gpu_sections.CAPTURE_COST, rows[1:])
    assert check(*arguments, "--resume") == 0
    again = sheets.read_csv(tmp_path / gpu_sections.CAPTURE_COST)
    assert again[:-1] == rows[1:] and again[-1]["part"] == rows[0]["part"]


@pytest.mark.slow
def test_a_section_that_fails_stops_no_other(tmp_path, monkeypatch, forking):
    """The first raises an error, the second does not end and keeps its row, and the third dies."""

    def bad(context):
        raise ValueError("what went wrong")

    def endless(context):
        work = {"first": lambda: {"ms": "1"}, "second": lambda: time.sleep(600)}
        return gpu_sections.measured(context, gpu_sections.CAPTURE_COST, work)

    sections = {"captures": (bad, 300.0), "limits": (endless, 7.0)}
    sections["kernels"] = (lambda _: os._exit(3), 300.0)
    for name, (run, limit) in sections.items():
        monkeypatch.setitem(gpu_sections.SECTIONS, name, gpu_sections.Section("measured", run, (limit, limit)))
    monkeypatch.setitem(gpu_check.CALLS, "measured", gpu_check.Call((900, 900), False))
    assert check("measured", "--rehearse", "--out", str(tmp_path), "--only", *sections) == 1
    assert states(tmp_path) == dict.fromkeys(sections, "failed")
    page = (tmp_path / "measured.md").read_text()
    assert "ValueError: what went wrong" in page and "Traceback" in page
    assert "was killed at its limit of 7 s" in page and "exit status 3" in page
    (row,) = sheets.read_csv(tmp_path / gpu_sections.CAPTURE_COST)
    assert (row["part"], row["rehearsal"]) == ("first", "True")


@pytest.mark.slow
def test_the_package_as_users_run_it(rehearsal, monkeypatch):
    outcome = gpu_sections.used(rehearsal)
    assert outcome.state == "passed" and not outcome.left_out, outcome
    rows = sheets.read_csv(rehearsal.out / gpu_sections.IN_USE)
    forms = ["fit, epoch 0", "fit, epoch 1", "fit, epoch 2", "loop, ResNet-18", "loop, ViT", "full card, epoch 17"]
    assert [row["form"] for row in rows] == forms
    assert all(float(row["images_per_s"]) > 0 and row["replays"] == "0" for row in rows)
    # On a GPU, a row without a replay of a graph has failed.
    cuda = torch.device("cuda")
    verdicts = [in_use.row("fit", cuda, seen, [])["verdict"] for seen in ([], [None])]
    assert verdicts == ["failed", "right"]
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)
    with in_use.replays() as seen:
        for _ in range(2):
            torch.cuda.CUDAGraph.replay(None)
    assert len(seen) == 2


def test_a_step_that_was_refused_is_not_called_captured(rerun, monkeypatch):
    with pytest.raises(RuntimeError, match="the attack of the training step was not captured"):
        pipelines.training_step(classifier_task(attack=attack()), batch(), compiled=False, captured=True)()
    monkeypatch.setattr(pipelines, "StepGraphs", lambda mode: StepGraphs(mode, capture=rerun))
    assert pipelines.training_step(
        classifier_task(attack=attack()), batch(), compiled=False, captured=True
    )().isfinite()
    rerun.error = RuntimeError("operation not permitted")
    with pytest.raises(RuntimeError, match="the attack of the training step was not"), pytest.warns(UserWarning):
        pipelines.training_step(classifier_task(attack=attack()), batch(), compiled=False, captured=True)()


TOOL = """#!/bin/sh
case "$2" in
memcheck) echo "========= ERROR SUMMARY: $ERRORS errors" ;;
racecheck) echo "========= RACECHECK SUMMARY: $HAZARDS hazards displayed (0 errors, 0 warnings)" ;;
esac
"""


@pytest.mark.parametrize(
    ("errors", "hazards", "state"), [("0", "0", "passed"), ("0", "2", "failed"), ("7", "0", "not available")]
)
def test_what_the_sanitizer_says_is_read(errors, hazards, state, tmp_path, monkeypatch):
    """Errors in a program that has none mean that the tool does not work here, which is no pass."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("ERRORS", errors)
    monkeypatch.setenv("HAZARDS", hazards)
    monkeypatch.setattr(gpu_sections, "EVERY_OP", ("-c", "print('every op')"))
    context = gpu_sections.Context(tmp_path, torch.device("cuda"), False, 60.0)
    outcome = gpu_sections.sanitizer(context)
    assert outcome.state == state and not outcome.left_out
    assert (f"racecheck: RACECHECK SUMMARY: {hazards} hazards" in outcome.summary) == (state != "not available")
    rehearsed = gpu_sections.sanitizer(gpu_sections.Context(tmp_path, CPU, True, 60.0))
    assert rehearsed.state == "not available" and "needs a CUDA device" in rehearsed.summary


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


def test_each_row_is_packed_at_once_and_a_long_part_keeps_no_other_from_its_start(tmp_path, monkeypatch):
    clock, found = [0.0], []
    monkeypatch.setattr(running.time, "monotonic", lambda: clock[0])
    context = gpu_sections.Context(tmp_path / "out", CPU, True, 100.0, archives=tmp_path / "back", started=0.0)

    def part(seconds):
        def run():
            if found:
                with tarfile.open(tmp_path / "back" / "goals.tar.xz") as archive:
                    lines = archive.extractfile(f"out/{gpu_sections.GOALS}").read().decode().splitlines()
                assert len(lines) == 1 + len(found)
            clock[0] += seconds
            found.append(seconds)
            return {"form": str(seconds)}

        return run

    work = {str(seconds): part(seconds) for seconds in (10, 60, 20, 30, 1)}
    outcome = gpu_sections.measured(context, gpu_sections.GOALS, work, alike=False)
    assert found == [10, 60, 20, 30] and outcome.left_out == ["1"]


def test_compiled_parts_run_once_before_and_an_error_there_ends_nothing(rehearsal, monkeypatch, capfd, forking):
    parts = {f"a, {form}": lambda device, quick, form=form: (print(form), 1 / 0) for form in goals.FORMS}
    monkeypatch.setattr(goals, "PARTS", parts)
    goals.compile_all(rehearsal)
    out, errors = capfd.readouterr()
    assert sorted(out.split("\n")) == ["", "expert, compiled", "ours, compiled"]
    assert errors.count("ZeroDivisionError: division by zero") == 2


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


def test_cudnn_races_in_the_raced_form_only(monkeypatch):
    """The captures in training steps ask for a race of their own, which the unraced form must not have."""
    seen = {}

    def job(goal, form, device, quick):
        seen[form] = pipelines.StepGraphs("always").cudnn_benchmark, torch.backends.cudnn.benchmark
        return pipelines.Job(lambda: None, lambda: torch.ones(1))

    # Only the context of a CUDA device changes cuDNN's setting.
    race = goals.raced_convolutions
    monkeypatch.setattr(goals, "raced_convolutions", lambda mode, device: race(mode, torch.device("cuda")))
    monkeypatch.setattr(goals, "_job", job)
    for form in (goals.UNRACED, goals.RACED):
        goals.measure(goals.PGD, form, CPU, True)
    assert seen == {goals.UNRACED: ("off", False), goals.RACED: ("off", True)}


def test_a_training_that_ends_early_or_drops_its_graphs_says_so(monkeypatch):
    def fit(task, *given, **options):
        task.graphs.mode = "off"
        raise RuntimeError("memory ran out")

    monkeypatch.setattr(in_use, "fit", fit)
    row = in_use.full(CPU, True)
    assert (row["ended"], row["dropped"], row["verdict"]) == (False, True, "failed") and "memory ran out" in row[
        "error"
    ]
