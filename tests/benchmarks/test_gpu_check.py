"""The check of a GPU, rehearsed on the CPU: sections, their limits and failures, what a second run does."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import until

from benchmarks import __main__ as program
from benchmarks.gpu import gpu_check, gpu_sections
from benchmarks.speed import limits, running, sheets, timing
from purify_fast import _library
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch.op import Call
from purify_fast.ops.dispatch.racing import Change

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")
STATES = ("passed", "not available")


def check(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        program.main(["gpu_check", *arguments])
    return int(end.value.code)


def states(folder: Path) -> dict[str, str]:
    return {path.stem: json.loads(path.read_text())["state"] for path in (folder / "gpu_check").glob("*.json")}


@pytest.mark.slow
def test_sections_run_once_and_again_after_a_change(tmp_path, capsys, forking):
    arguments = ("--dry", "--out", str(tmp_path), "--only", "extension", "limits")
    assert check(*arguments) == 0
    assert states(tmp_path) == {"extension": "passed", "limits": "passed"}
    assert {row["limit"] for row in sheets.read_csv(tmp_path / limits.FILE)} == {limits.COPY, limits.PRODUCT}
    assert "| extension | passed |" in capsys.readouterr().out
    table = (tmp_path / "gpu_check.md").read_text()
    assert "# Rehearsal on a CPU" in table and "| tests | not run |" in table
    paths = sorted((tmp_path / "gpu_check").glob("*.json"))
    before = [path.stat().st_mtime_ns for path in paths]
    assert check(*arguments) == 0
    assert [path.stat().st_mtime_ns for path in paths] == before
    changed = json.loads(paths[0].read_text())
    changed["fingerprint"]["sources"] = "of another day"
    paths[0].write_text(json.dumps(changed))
    assert check(*arguments) == 0
    assert [path.stat().st_mtime_ns > old for path, old in zip(paths, before, strict=True)] == [True, False]


def test_the_fingerprint_follows_the_sources(tmp_path, monkeypatch):
    first = gpu_sections.fingerprint(CPU, True)
    assert first == gpu_sections.fingerprint(CPU, True) != gpu_sections.fingerprint(CPU, False)
    path = tmp_path / "extension.json"
    path.write_text(json.dumps({"state": "passed", "fingerprint": first}))
    assert gpu_check.done(path, first) and gpu_check.done(tmp_path / "none.json", first) is None
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "new.py").write_text("")
    monkeypatch.setattr(gpu_sections, "ROOT", tmp_path)
    assert gpu_check.done(path, gpu_sections.fingerprint(CPU, True)) is None


def test_a_section_that_fails_stops_no_other(tmp_path, monkeypatch, forking):
    """One raises, one does not end, one dies."""

    def bad(context):
        raise ValueError("what went wrong")

    sections = {"extension": (bad, 300.0), "limits": (lambda _: time.sleep(600), 5.0)}
    sections["sanitizer"] = (lambda _: os._exit(3), 300.0)
    for name, (run, limit) in sections.items():
        monkeypatch.setitem(gpu_sections.SECTIONS, name, gpu_sections.Section("tests", run, (limit, limit)))
    monkeypatch.setattr(gpu_check, "GRACE", (0.5, 0.5))
    monkeypatch.setitem(gpu_check.TOTALS, "tests", (900, 900))
    assert check("--dry", "--out", str(tmp_path), "--only", *sections) == 1
    assert states(tmp_path) == dict.fromkeys(sections, "failed")
    page = (tmp_path / "gpu_check.md").read_text()
    assert "ValueError: what went wrong" in page and "Traceback" in page
    assert "after its limit of 5 s" in page and "exit status 3" in page


#: The second of three tests waits for a file, and says which process it is in.
WAITING = """
import os, sys, time
from pathlib import Path

def test_one():
    pass

def test_two():
    here = Path(__file__).parent
    (here / "pid.new").write_text(str(os.getpid()))
    (here / "pid.new").rename(here / "pid")
    while not (here / "go").exists():
        time.sleep(0.01)

def test_three():
    pass
"""
#: Their outcomes are written as those of tests/gpu are.
OUTCOMES = f"""
import runpy
made = runpy.run_path({str(ROOT / "tests" / "gpu" / "conftest.py")!r})
globals().update((name, value) for name, value in made.items() if name.startswith("pytest_"))
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # the system keeps a process that has ended until its parent asks for its status
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.parametrize("section", ["replays", "tests"])
def test_what_is_killed_goes_on_where_it_was(section, tmp_path, monkeypatch, forking):
    """Killed in its second row or test: nothing of it lives on, and nothing is done twice."""
    out, place = tmp_path / "out", tmp_path / "tests"
    place.mkdir()
    (place / "test_waiting.py").write_text(WAITING)
    (place / "conftest.py").write_text(OUTCOMES)
    monkeypatch.setattr(gpu_sections, "TESTS", (str(place),))
    monkeypatch.setitem(gpu_check.TOTALS, "tests", (1900, 1900))

    def work(context):
        made = runpy.run_path(str(place / "test_waiting.py"))
        parts = {name: lambda run=run: run() or [{"of": 3}] for name, run in made.items() if name.startswith("test_")}
        return gpu_sections.measured(context, "replays.csv", parts)

    long = (900.0, 900.0)
    sections = {"replays": gpu_sections.Section("ops", work, long, ("replays.csv",))}
    sections["tests"] = replace(gpu_sections.SECTIONS["tests"], limits=long)
    monkeypatch.setitem(gpu_sections.SECTIONS, section, sections[section])

    def lines() -> list[str]:
        found = {"replays": out / "replays.csv", "tests": out / "gpu_check" / "tests.outcomes"}[section]
        return [line for line in found.read_text().splitlines() if not line.startswith("part,")]

    def run() -> int:
        return check("--dry", "--out", str(out), "--only", section)

    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    until(lambda: (place / "pid").exists() or os.waitpid(child, os.WNOHANG)[0] == child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pid = int((place / "pid").read_text())
    until(lambda: not alive(pid))
    before = lines()
    assert len(before) == 1 and states(out) == {}
    (place / "go").touch()
    assert run() == 0
    assert lines()[:1] == before and len(set(lines())) == len(lines()) == 3
    assert states(out) == {section: "passed"}
    summary = json.loads((out / "gpu_check" / f"{section}.json").read_text())["summary"]
    assert summary.startswith({"replays": "3 of 3 parts measured", "tests": "3 passed, 0 failed"}[section])


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


def device_tests(*words: str, **environ: str) -> str:
    """Pytest's summary of some of a device's tests, rehearsed on a CPU."""
    # a rehearsal skips much that a device would run
    environ = {"PURIFY_FAST_TEST_COMPLETE": "", "PURIFY_FAST_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1", **environ}
    environ = os.environ | environ
    command = [sys.executable, "-m", "pytest", *words, "-p", "no:cacheprovider", "-v", "-rs"]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(not _library.loaded(), reason="the rehearsal needs the compiled extension")
def test_the_tests_of_a_device_can_be_rehearsed():
    said = device_tests("tests/gpu", "-k", "(reconstruction_loss and not gradient) or study")
    assert " passed" in said and " failed" not in said and "has neither streams nor CUDA graphs" in said
    late = device_tests("tests/gpu/test_study.py", PURIFY_FAST_TEST_SECONDS="0")
    assert "left out: the time limit of 0 s" in late


def test_a_budget_names_what_it_leaves_out():
    made: list[str] = []
    work = [(name, lambda name=name: made.append(name) or time.sleep(0.2)) for name in "abcdef"]
    budget = running.Budget(0.5)
    budget.go(work, "row")
    assert 1 <= len(made) < 6 and made + budget.left_out == list("abcdef")
    failing = running.Budget(failed={})
    failing.go([("bad", lambda: 1 / 0), ("good", lambda: made.append("good"))], "row")
    assert "ZeroDivisionError" in failing.failed["bad"] and made[-1] == "good" and not failing.left_out
    with pytest.raises(ZeroDivisionError):
        running.Budget().go([("bad", lambda: 1 / 0)], "row")


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    measured: list[tuple] = []

    def fake(op, case, direction, style, *rest):
        measured.append((op, case.variant, style))
        columns = dict.fromkeys(("runs", "device", "threads", "torch", "triton", "GB_per_s"), "1")
        times = dict.fromkeys((f"{kind}_us" for kind in timing.CONTESTANTS), "1")
        row = dict(zip(running.KEY, running.key(op, case, direction, style), strict=True))
        return row | times | columns | {"backend": "cpp", "ratio": "1.000", "verdict": "best"}

    monkeypatch.setattr(timing, "measure", fake)
    running.run_ops(["apgd_step"], CPU, True, tmp_path, running.Budget())
    running.run_ops(["apgd_step", "noisy_replay"], CPU, True, tmp_path, running.Budget(resume=True))
    assert [op for op, *_ in measured] == 4 * ["apgd_step"] + 4 * ["noisy_replay"]
    running.run_ops(["apgd_step"], CPU, True, tmp_path, running.Budget())
    rows = sheets.read_csv(tmp_path / sheets.ROWS)
    assert len(measured) == 12 and len(rows) == 8


def test_limits_are_rates_of_random_data(tmp_path):
    data = limits.operands(CPU, 64, 64)
    assert data.dtype == torch.bfloat16 and data.unique().numel() > 100
    rows = limits.run(CPU, True, tmp_path)
    for row in rows:
        assert 0 < float(row["p20"]) <= float(row["median"]) <= float(row["p80"])
    found = limits.read(tmp_path)
    name = timing.environment(CPU)["device"]
    assert found == {(name, row["limit"]): float(row["median"]) for row in rows}


def test_wrong_arguments_are_refused(capsys):
    assert check("--only", "nothing") == 2
    assert "argument --only: 'nothing' is unknown" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_names_the_rehearsal():
    with pytest.raises(ValueError, match="no CUDA device is available: use --dry"):
        program.main(["gpu_check"])


def test_the_three_commands_hold_every_section_within_nine_minutes():
    parts, known = [section.part for section in gpu_check.SECTIONS.values()], list(gpu_check.TOTALS)
    assert set(parts) == set(known) and sorted(parts, key=known.index) == parts
    # the five measurements come first
    order = [name for name in gpu_check.SECTIONS if name not in ("extension", "limits")]
    assert order[:6] == ["captures", "verdicts", "tests", "standard", "steps", "replays"]
    for part in gpu_check.TOTALS:
        own = [section for section in gpu_check.SECTIONS.values() if section.part == part]
        assert sum(section.limits[0] + gpu_check.GRACE[0] for section in own) <= 540
    assert {part: dry for part, (_, dry) in gpu_check.TOTALS.items()} == {"tests": 140, "ops": 95, "pipelines": 65}


@pytest.mark.skipif(not _library.loaded(), reason="the CPU's kernels are the extension's")
def test_the_races_end_in_a_file_that_could_ship_and_in_a_chapter(tmp_path, monkeypatch, capsys):
    """The second command rehearsed, with the races of one op: nothing outside of the folder is written."""
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path / "cache"))
    kept = {name: op for name, op in REGISTRY.items() if name == "noisy_replay"}
    monkeypatch.setattr("purify_fast.ops.dispatch.racing.REGISTRY", kept)
    monkeypatch.setattr(gpu_sections.racing, "RUN", 1e-5)
    monkeypatch.setitem(gpu_sections.racing.ELEMENTS, "cpu", {"small": 2**10})
    # which calls change hands depends on the machine: one is made up
    call = Call(CPU, "all", torch.float32, 10)
    change, tune = Change("noisy_replay", call, "reference", "cpp", 2.0), gpu_sections.racing.tune
    monkeypatch.setattr(gpu_sections.racing, "tune", lambda *a, **k: replace(tune(*a, **k), changes=[change]))
    out = tmp_path / "cpu"
    context = gpu_sections.Context(out, CPU, True, 60.0)
    outcome = gpu_sections.races(context)
    assert outcome.state == "passed" and not outcome.left_out, outcome
    (change,) = json.loads(json.dumps(outcome.details))["changes"]
    served = {"before": "reference", "after": "cpp", "gain": 2.0}
    assert change == {"op": "noisy_replay", "call": f"eager {call.cell}", **served}
    raced = json.loads((out / "raced.json").read_text())["ops"]["noisy_replay"]["rows"]
    assert raced and all(row["reference_us"] > 0 < row["kernel_us"] for row in raced)
    before = {path: path.read_bytes() for path in (ROOT / "docs/performance.md", ROOT / "purify_fast/ops/races.json")}
    assert [path.name for path in gpu_check.conclude(out, True)] == ["chapter.md", "races.json"]
    assert "| noisy_replay |" in (out / "chapter.md").read_text()
    (shipped,) = json.loads((out / "races.json").read_text())
    assert set(shipped["ops"]) == {"noisy_replay"} and "rows" not in shipped["ops"]["noisy_replay"]
    assert {path: path.read_bytes() for path in before} == before
