"""The studies' runner resumes, refuses what it cannot run before any work, and the tables say what the results say."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import __main__ as program
from benchmarks import pipelines, race, report, running
from benchmarks.studies import (
    RESULT,
    Job,
    arrest_mnist,
    atop_mnist,
    carso_digits,
    carso_mnist,
    command,
    digits,
    mnist,
    over_seeds,
    run,
)
from purify_fast import data
from purify_fast.attacks import APGD, AutoAttack
from purify_fast.evaluation import Report, measure

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


# the jobs run in other processes, which import their work from a file
WORK = """
import json, time
from dataclasses import dataclass
from benchmarks.studies import RESULT


@dataclass(frozen=True)
class Budget:
    epochs: int = 3


def work(job, folder, root):
    with (root / "log").open("a") as log:
        log.write(f"{job.name} {job.seed}\\n")
    if job.settings.get("fail") and not (root / "mended").exists():
        raise RuntimeError("no luck")
    time.sleep(job.settings.get("wait", 0))
    return {"saw": [json.loads((job.folder(root, need) / RESULT).read_text())["name"] for need in job.needs]}
"""


def work(job: Job, folder: Path, root: Path) -> dict:
    raise AssertionError("it was run")


@pytest.fixture
def elsewhere(tmp_path_factory, monkeypatch) -> ModuleType:
    """A module with jobs' work: what ran is written to a file; it fails, or waits, if its settings say so."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "some_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "some_work", raising=False)
    return importlib.import_module("some_work")


def test_needs_come_first_a_failure_is_named_and_a_second_run_goes_on(tmp_path, capfd, elsewhere):
    work, Budget = elsewhere.work, elsewhere.Budget
    jobs = [
        Job("last", 0, work, ("first/of all", "bad")),
        Job("bad", 0, work, ("first/of all",), {"fail": True}),
        Job("first/of all", 0, work, settings={"budget": Budget(), "data": "here"}),
    ]
    with pytest.raises(RuntimeError, match="no luck"):
        run(jobs, tmp_path, workers=1)
    assert "bad, seed 0, failed" in capfd.readouterr().err
    assert [job.done(tmp_path) for job in jobs] == [False, False, True]
    (tmp_path / "mended").touch()
    got = run(jobs, tmp_path, workers=1)
    assert [result["name"] for result in got] == [job.name for job in jobs]  # in the order of jobs
    assert got[0]["saw"] == ["first/of all", "bad"] and got[1]["seed"] == 0 and got[2]["minutes"] >= 0
    log = (tmp_path / "log").read_text()
    assert log.splitlines() == ["first/of all 0", "bad 0", "bad 0", "last 0"]
    moved = replace(jobs[2], settings={"budget": Budget(), "data": "there"})  # the same data, moved
    assert run([*jobs[:2], moved], tmp_path, workers=1) == got and (tmp_path / "log").read_text() == log
    other = replace(jobs[2], settings={"budget": Budget(4)})
    with pytest.raises(ValueError, match=r"'first/of all' with other settings \(budget: .*3.* there, .*4.* now\)"):
        run([*jobs[:2], other], tmp_path)
    assert (tmp_path / "log").read_text() == log


@pytest.mark.parametrize(
    "jobs, message",
    [
        ([], "no job"),
        ([Job("a", 0, work), Job("a", 0, work)], "names of their own"),
        ([Job("a b", 0, work), Job("a-b", 0, work)], "names of their own"),  # they would share a folder
        ([Job("a", 0, work, ("b",)), Job("b", 1, work)], "a needs 'b' of seed 0, which the study has not"),
        (
            [Job("x", 0, work), Job("a", 0, work, ("b",)), Job("b", 0, work, ("a",))],
            "need each other: [ab], [ab], [ab]",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(tmp_path, jobs, message):
    with pytest.raises(ValueError, match=message):
        run(jobs, tmp_path, workers=1)
    assert not any(tmp_path.iterdir())


def test_an_interrupted_study_ends_at_once(tmp_path, elsewhere):
    script = (
        "from pathlib import Path; from benchmarks.studies import Job, run; from some_work import work\n"
        f"if __name__ == '__main__': run([Job('long', 0, work, settings={{'wait': 600}})], Path({str(tmp_path)!r}), 1)"
    )
    where = os.pathsep.join([str(ROOT), str(Path(elsewhere.__file__).parent)])
    (tmp_path / "study.py").write_text(script)
    study = subprocess.Popen(
        [sys.executable, str(tmp_path / "study.py")],
        env=os.environ | {"PYTHONPATH": where},
        stderr=subprocess.DEVNULL,
        # a suite started in the background ignores the signal, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "log").exists():
            assert time.monotonic() < until and study.poll() is None
            time.sleep(0.1)
        study.send_signal(signal.SIGINT)
        assert study.wait(60) != 0
    finally:
        study.kill()


def result(name: str, seed: int, clean: float, robust: float, **more) -> dict:
    return {"name": name, "seed": seed, "clean": clean, "pgd": robust + 0.1, "autoattack": robust, **more}


def lines_of(text: str) -> dict[str, list[str]]:
    """Rows of the Markdown tables by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_tables_by_hand(tmp_path):
    layer = {"layer": "conv", "probe": 0.5, "image": 0.25, "drift": 0.1, "features": 8}
    results = [
        result("base", 0, 0.9, 0.3, gradients="healthy", parameters=1000, layers=[layer]),
        result("base", 1, 0.8, 0.2, gradients="healthy", parameters=1000, layers=[layer | {"probe": 0.7}]),
        result("pipeline", 1, 0.7, 0.25, gradients="BAD", kl=1.5, clean_draws=0.6, pgd_draws=0.35, parameters=2000),
        result("base, L2", 1, 0.5, 0.4),
        result("pipeline, L2", 1, 0.5, 0.45),
    ]
    assert over_seeds([0.1, 0.3]) == "20.0 ± 10.0" and over_seeds([0.1]) == "10.0"
    text = digits.markdown(results, ["What it is."], carso_digits.LAYOUT)
    assert text.startswith("What it is.\n\n| model |")
    rows = lines_of(text)
    widths = {len(row) for row in rows.values()}
    assert widths == {9, 4}  # no cell beyond the head's: a renderer would drop it
    assert rows["base"][:4] == ["85.0 ± 5.0", "35.0 ± 5.0", "25.0 ± 5.0", "-"] and rows["base"][-1] == "2"
    # against the base of the same seed, not against the mean of all
    assert rows["pipeline (gradients unhealthy)"] == [
        "70.0", "35.0", "25.0", "5.0", "60.0", "35.0", "1.50", "2,000", "1",
    ]  # fmt: skip
    assert rows["base, L2"][3] == "-" and rows["pipeline, L2"][3] == "5.0"
    assert rows["conv"] == ["60.0 ± 10.0", "25.0 ± 0.0", "0.10", "8"]
    path = digits.write(results, tmp_path, "study", ["What it is."], carso_digits.LAYOUT)
    assert path.read_text() == text and json.loads((tmp_path / "study.json").read_text()) == results


@pytest.mark.parametrize(
    "study, row, cell",  # and one that only some rows have
    [("carso_digits", "paper's objective", 6), ("atop_digits", "pipeline, S = 4 when it predicts", 5)],
)
def test_digits_end_to_end(study, row, cell, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("pyautoattack")
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    options = ["--seeds", "1", "--workers", "1", "--rows", row, "--out", str(tmp_path / "runs")]
    arguments = ["study", study, "--quick", *options]
    program.main(arguments)
    rows = lines_of(capsys.readouterr().out)
    assert {"base", row} < set(rows) and float(rows[row][0]) >= 0 and rows[row][cell] != "-"
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob(f"*/{RESULT}")}
    program.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob(f"*/{RESULT}")} == first
    assert lines_of(capsys.readouterr().out) == rows and not (tmp_path / "results").exists()
    with pytest.raises(ValueError, match=r"'base' with other settings \(quick: True there, False now"):
        program.main([*arguments[:2], *options])


def test_some_rows_or_fewer_seeds_leave_the_committed_table_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "run", lambda jobs, *rest: [result(job.name, job.seed, 0.9, 0.4) for job in jobs])

    def written(*options: str) -> Path:
        parser = program.argparse.ArgumentParser()
        command.arguments(parser)
        return command.written(parser.parse_args(["carso_digits", "--out", str(tmp_path / "runs"), *options]))

    for options in (["--quick"], ["--rows", "base"], ["--seeds", "2"]):
        assert written(*options) == tmp_path / "runs" / "carso_digits.md"
    assert written() == tmp_path / "results" / "carso_digits.md"
    text = written("--seeds", "4").read_text()
    assert "AutoAttack standard (100 steps, 1,000 queries" in text and "PGD-100 with" in text


def test_rows_bring_their_needs():
    made = carso_digits.jobs(2, True, ["pipeline, hidden alone"])
    names = ["base", "paper's objective, hidden alone", "pipeline, hidden alone"]
    assert sorted((job.seed, job.name) for job in made) == sorted((seed, name) for seed in range(2) for name in names)
    assert {job.settings["quick"] for job in made} == {True}


@pytest.mark.parametrize(
    "options, message",
    [
        ("carso_digits --rows bass", "no such rows: bass; there are base, base, L2"),
        ("carso_digits --rows", "expected at least one argument"),
        ("carso_digits --seeds 0", "--seeds must be at least 1, got 0"),
        ("carso_digits --full", "--full does not go with carso_digits"),
        ("carso_digits --data here", "--data does not go with carso_digits"),
        ("carso_digits --full --quick", "not allowed with"),
        ("carso_mnist --seeds 2", "--seeds does not go with carso_mnist"),
        ("atop_mnist --rows base", "--rows does not go with atop_mnist"),
        ("carso_mnist --workers 0", "--workers must be at least 1, got 0"),
        ("cifar10 --workers 0", "--workers must be at least 1, got 0"),
        ("cifar10 --device gpu", "--device gpu cannot be used here"),
        ("carso_mnist --device cpu", "--device does not go with carso_mnist"),
        ("carso_mnist --data nowhere", "no data set 'mnist'"),
        ("carso_resnet18 --data nowhere", "no data set 'cifar10'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(options, message, capsys, monkeypatch):
    pytest.importorskip("pyautoattack")
    monkeypatch.setattr(command, "main", lambda chosen: pytest.fail("it was run"))
    with pytest.raises(SystemExit, match="2"):
        program.main(["study", *options.split()])
    assert message in capsys.readouterr().err


def test_without_autoattack_nothing_is_trained(capsys, monkeypatch):
    for package in ("pyautoattack", "autoattack"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(command, "main", lambda chosen: pytest.fail("it was run"))
    with pytest.raises(SystemExit, match="2"):
        program.main(["study", "carso_digits"])
    assert "AutoAttack is not installed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):  # this one does not use it
        program.main(["study", "atop_mnist", "--data", "nowhere"])
    assert "no data set 'mnist'" in capsys.readouterr().err


def test_the_mnist_table_is_what_the_jobs_found(tmp_path, monkeypatch):
    """One classifier under all four names: no row is made anew for the table, and no group takes from another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.rand(24, 1, 8, 8).mul(255).to(torch.uint8)
    with torch.no_grad():
        y = model(x.float() / 255).argmax(1)
    images = data.DataSet(x, y, x, y, "mnist", 10)
    monkeypatch.setattr(mnist, "load", lambda *a: images)
    monkeypatch.setattr(carso_mnist, "_model", lambda *a: model)
    monkeypatch.setattr(mnist, "EPS", 0.02)
    monkeypatch.setattr(carso_mnist, "PEEL", "another")  # a head is for models that draw
    for kind in (AutoAttack, APGD):  # finds nothing
        monkeypatch.setattr(kind, "search", lambda self, target, x, y, context: x.clone())
    budget = replace(carso_mnist.QUICK, images=24, steps=5, eot=1)
    made = [job for job in carso_mnist.jobs("", budget=budget) if job.work is carso_mnist.attack]
    found = {(j.settings["model"], j.settings["group"]): j.work(j, j.folder(tmp_path), tmp_path) for j in made}
    monkeypatch.setattr(measure.Measure, "_measure_attack", lambda *a: pytest.fail("a row was made anew"))
    whole = carso_mnist.report(tmp_path)
    for (name, _), rows in found.items():
        for label, accuracy in rows.items():
            if not label.startswith("worst"):
                assert whole.row(label, name).accuracy == accuracy
    one = {label: whole.row(label, carso_mnist.CLASSIFIER).accuracy for label in whole.attacks}
    assert one["APGD ce + APGD-T, z = 0"] == one["clean"] == 1 > one["PGD-5 ce + dlr, EOT 1"] == one["worst"] > 0


@pytest.fixture
def small_mnist(tmp_path) -> Path:
    """A folder with digits as mnist.npz."""
    pytest.importorskip("sklearn")
    found = data.load_dataset("digits")
    arrays = {name: getattr(found, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    wide = {name: F.pad(a, (6, 6, 6, 6)) if a.dim() == 4 else a for name, a in arrays.items()}
    np.savez(tmp_path / "mnist.npz", **{name: a.numpy() for name, a in wide.items()})
    return tmp_path


def test_atop_on_mnist_end_to_end(small_mnist, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    runs = tmp_path / "runs"
    options = ["--data", str(small_mnist), "--workers", "1", "--out", str(runs)]
    program.main(["study", "atop_mnist", "--quick", *options])
    text = capsys.readouterr().out
    rows = lines_of(text)
    assert all(len(rows[label]) == len(atop_mnist.BASES) for label in ("clean", "then PGD-2 dlr, EOT 2", "worst"))
    weak = next(label for label in rows if label.startswith("weak protocol"))
    assert "not adaptive" in weak and [cell == "-" for cell in rows[weak]] == [
        name == base for name, base in atop_mnist.BASES.items()
    ]
    assert f"| {atop_mnist.PIPELINE} | then PGD-2 ce, EOT 2 | 2 | " in text and "/20 |" in text
    assert text.count("(n = 20, paired)") == 3
    left = Report.from_json((runs / "atop_mnist" / "report.json").read_text())
    for name in left.models:  # each attack goes on from where the one before it ended
        taken = [left.row(label, name).accuracy for label in left.attacks if label.startswith(("PGD", "then PGD"))]
        assert taken == sorted(taken, reverse=True) and left.row("worst", name).accuracy == taken[-1]
    # the same purifier stands before both classifiers
    jobs = {job.name: job for job in atop_mnist.jobs("", budget=atop_mnist.QUICK)}
    pipeline, robust = (jobs[name] for name in (atop_mnist.PIPELINE, atop_mnist.ROBUST_PIPELINE))
    assert pipeline.needs[1:] == robust.needs[1:] == (atop_mnist.PRETRAINED,)
    weights = [safetensors.torch.load_file(job.folder(runs) / "model.safetensors") for job in (pipeline, robust)]
    assert any((weights[0][key] != weights[1][key]).any() for key in weights[0])


def test_arrest_on_mnist_end_to_end(small_mnist, tmp_path, capsys, monkeypatch):
    pytest.importorskip("pyautoattack")
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    runs = tmp_path / "runs"
    options = ["--data", str(small_mnist), "--workers", "1", "--out", str(runs)]
    program.main(["study", "arrest_mnist", "--quick", *options])
    text = capsys.readouterr().out
    rows = lines_of(text)
    labels = ("clean", "PGD-2 ce", "then PGD-2 dlr", "then AutoAttack standard, first 4", "worst")
    assert all(len(rows[label]) == len(arrest_mnist.MODELS) for label in labels)
    assert text.count("(n = 20, paired)") == text.count("(n = 4, paired)") == len(arrest_mnist.MODELS) - 2
    left = Report.from_json((runs / "arrest_mnist" / "report.json").read_text())
    for name in arrest_mnist.MODELS:
        clean, worst = (100 * left.row(row, name).accuracy for row in ("clean", "worst"))
        assert f"| {name} | {clean + worst:.1f} | " in text
    assert (runs / "arrest_mnist" / "tradeoff.png").is_file()
    made = {name: arrest_mnist.config(arrest_mnist.Budget(), name) for name in arrest_mnist.MODELS[2:]}
    assert {name: (c.distillation_weight > 0, c.replay) for name, c in made.items()} == {
        arrest_mnist.FINETUNED: (False, False),
        arrest_mnist.ARREST: (True, True),
    }


def test_an_interrupted_race_keeps_what_other_cases_had(tmp_path, monkeypatch):
    cases = {name: {"big": None, "small": None} for name in ("one", "two")}
    monkeypatch.setattr(pipelines, "registry", lambda: {n: (lambda quick, c=c: c) for n, c in cases.items()})
    monkeypatch.setattr(report, "report_pipelines", lambda out: None)

    def right(pipeline: str, case: str, ms: str) -> list[dict]:
        return [{"pipeline": pipeline, "case": case, "ms": ms, "verdict": "right"}]

    monkeypatch.setattr(race, "race", lambda pipeline, case, *a: right(pipeline, case, ms))

    def rows() -> set[tuple[str, ...]]:
        return {(row["pipeline"], row["case"], row["ms"]) for row in report.read_csv(tmp_path / report.PIPELINES)}

    ms, cpu = "1", torch.device("cpu")
    running.run_pipelines(["one", "two"], cpu, True, tmp_path)
    calls: list[str] = []

    def breaks(pipeline, case, *a):
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(pipeline, case, "2")

    monkeypatch.setattr(race, "race", breaks)
    with pytest.raises(KeyboardInterrupt):
        running.run_pipelines(["one", "two"], cpu, True, tmp_path)
    assert rows() == {("one", "big", "2"), ("one", "small", "1"), ("two", "big", "1"), ("two", "small", "1")}


def test_report_of_an_empty_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(["report", str(tmp_path)])
    assert "holds neither ops.csv nor pipelines.csv" in capsys.readouterr().err
