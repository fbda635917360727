"""The committed comparison of plans with runs, and how it is made."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import kept
from benchmarks.speed import plans
from purify_fast.speed.run_cost import Forecast

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_every_prediction_is_near_its_measurement():
    rows = kept.rows_of(RESULTS / plans.FILE)
    assert [row["run"] for row in rows] == list(plans.RUNS)
    for row in rows:
        time, memory = plans.factors(row)
        assert 1 / plans.MOST_TIME <= time <= plans.MOST_TIME, row
        assert 1 / plans.MOST_MEMORY <= memory <= plans.MOST_MEMORY, row
        assert row["command"] == plans.RUNS[row["run"]].format(data="DIR"), "the command has changed: measure it again"


def test_the_text_of_a_plan_is_read():
    assert plans.read(Forecast("12 steps", 31.4, 1.234e9).to_text()) == (31, 1.23e9)
    assert plans.read(Forecast("12 steps", 600.0, 9e8).to_text())[0] == 600
    with pytest.raises(ValueError, match="lines of time and memory"):
        plans.read("12 steps")


def test_a_process_is_measured(tmp_path, monkeypatch):
    """Its memory is its own peak, not that of this process. An error of the command is an error of the measurement."""
    code = "held = bytearray(b'x') * (300 * 10**6); import time; time.sleep(0.5); print('done')"
    here = bytearray(b"x") * (500 * 10**6)
    start = subprocess.Popen
    monkeypatch.setattr(plans.subprocess, "Popen", lambda words, **more: start([sys.executable, "-c", code], **more))
    text, seconds, memory = plans.called(["plan"], str(tmp_path))
    assert text == "done\n" and 0.5 <= seconds < 60 and 3e8 < memory < 4e8 < len(here)
    code = "raise SystemExit('no such model')"
    with pytest.raises(RuntimeError, match=r"purify-fast plan ended with 1:\nno such model"):
        plans.called(["plan"], str(tmp_path))


def test_a_run_is_predicted_and_then_measured(tmp_path, monkeypatch):
    asked = []

    def called(words, folder):
        asked.append(words)
        return Forecast("a run", 40.0, 1e9).to_text() if words[0] == "plan" else "", 50.0, 8 * 10**8

    monkeypatch.setattr(plans, "called", called)
    monkeypatch.setattr(plans, "RESULTS", tmp_path)
    first, second = list(plans.RUNS)[:2]
    for name in (second, first, second):
        path = plans.main(Namespace(names=[name], data=tmp_path))
    rows = json.loads(path.read_text())
    assert [row["run"] for row in rows] == [first, second]
    assert plans.factors(rows[0]) == (0.8, 1.25)
    assert asked[0] == ["plan", *asked[1][:-2]] and asked[1][-2:] == ["--out", "run"]
    assert f"{tmp_path}/mnist.npz" in asked[2] and "DIR/mnist.npz" in rows[0]["command"]
    assert plans.table(tmp_path)[-1] == f"| {second} | 40 | 50 | 0.80 | 1000 | 800 | 1.25 |"
    with pytest.raises(FileNotFoundError):
        plans.table(tmp_path / "none")
