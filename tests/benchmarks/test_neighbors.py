"""The times beside busy processes: the committed table, and how a row is made."""

import json
import subprocess
from argparse import Namespace

import pytest

from benchmarks import RESULTS, kept
from benchmarks.speed import neighbors
from purify_fast.speed.threads import restored_threads


def test_the_committed_rows_are_complete_and_in_the_order_of_the_table():
    rows = kept.rows_of(RESULTS / neighbors.FILE)
    every = [(busy, form) for busy in (0, neighbors.BUSY) for form in neighbors.FORMS]
    assert [(row["busy"], row["form"]) for row in rows] == every
    assert all(list(row["ms"]) == list(neighbors.NETWORKS) for row in rows)
    assert len(neighbors.table(RESULTS)) == 4 + 2 * len(neighbors.NETWORKS)


@pytest.mark.parametrize("fails", [False, True])
def test_busy_processes_run_beside_the_measurement_and_are_killed(fails, tmp_path, monkeypatch):
    began, ran, start = [], [], subprocess.Popen

    def process(command):
        began.append(start(command))
        return began[-1]

    def output(command, env, timeout):
        ran.append((env.get("OMP_WAIT_POLICY"), [each.poll() for each in began[-2:]]))
        if fails:
            raise subprocess.TimeoutExpired(command, timeout)
        return json.dumps({name: [1.5, 1] for name in neighbors.NETWORKS})

    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(neighbors, "RESULTS", tmp_path)
    monkeypatch.setattr(neighbors, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(subprocess, "Popen", process)
    monkeypatch.setattr(subprocess, "check_output", output)
    (tmp_path / "cpu").mkdir()
    try:
        neighbors.main(Namespace(busy=[2], seconds=0.0, wait=0.0))
    except subprocess.TimeoutExpired:
        assert fails
    assert all(each.wait(10) < 0 for each in began)
    assert ran == [(policy, [None, None]) for policy in (None, None, "PASSIVE", "PASSIVE")][: 1 if fails else 4]


def test_a_measurement_prints_the_time_and_the_threads_of_each_network(capsys, monkeypatch):
    monkeypatch.setattr(neighbors, "fastest_threads", lambda step: 1)
    with restored_threads():
        neighbors.child(None, 0.0)
    timed = json.loads(capsys.readouterr().out)
    assert list(timed) == list(neighbors.NETWORKS)
    assert all(ms > 0 and threads == 1 for ms, threads in timed.values())
