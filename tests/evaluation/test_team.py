"""An evaluation that several processes share has the rows of one, image by image, whatever happens to them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from teamwork import KINDS

from purify_fast._files import folder_lock

SCRIPT = Path(__file__).with_name("teamwork.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}


def result(folder, name, rank=0):
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def torchrun(folder, world, *actions, how=()):
    """Actions of teamwork.py in processes that torchrun starts, and ends together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *how]
    command += [str(SCRIPT), str(folder), repr(list(actions))]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def processes(folder, world, *actions, store="env://"):
    """The same in processes that do not end with each other; their exit statuses and errors."""
    (folder / "store").unlink(missing_ok=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29900 + os.getpid() % 90), "STORE": store}
    started = []
    for rank in range(world):
        own = {"RANK": str(rank), "WORLD_SIZE": str(world)}
        command = [sys.executable, str(SCRIPT), str(folder), repr(list(actions))]
        started.append(subprocess.Popen(command, env=ENVIRONMENT | address | own, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=60)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], errors


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process finds."""
    folder = tmp_path_factory.mktemp("one")
    command = [sys.executable, str(SCRIPT), str(folder), "[('reports', ())]"]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=120)
    return result(folder, "reports")


def without_margins(report):
    for row in report["rows"]:
        row.pop("margins", None)
    return report


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_rows_are_those_of_one_process(one, tmp_path, world):
    """With a folder and without; also on the others but for the arrays beside the report."""
    done = torchrun(tmp_path, world, ("reports", (str(tmp_path / "out"),)))
    assert done.returncode == 0, done.stderr
    assert result(tmp_path, "reports") == one
    for rank in range(1, world):
        others = result(tmp_path, "reports", rank)
        assert others == {kind: without_margins(json.loads(json.dumps(one[kind]))) for kind in KINDS}
    # the attacks found something, and not everything
    for kind in KINDS:
        accuracies = {row["mean"] for row in one[kind]["rows"]}
        assert len(accuracies) > 2 and min(accuracies) > 0.1, kind
    # nothing is left but the rows
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_dir() and path.parent.name == "rows"]


def test_without_a_folder_nothing_is_left(one, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path / "temporary"))
    done = torchrun(tmp_path, 2, ("counted", ("own", None)), ("report", ("deterministic",)))
    assert done.returncode == 0, done.stderr
    (first, made), (_, others) = (result(tmp_path, "counted", rank) for rank in (0, 1))
    # 22 images by 4, one attack after the other
    assert first == one["own"] and made + others in (10, 11, 12) and others > 0
    assert result(tmp_path, "report") == one["deterministic"]
    assert not list((tmp_path / "temporary").glob("shared-*"))


@pytest.mark.parametrize(
    ("kind", "victim", "number", "moment"),
    [
        ("deterministic", 1, 1, "keep"),
        ("random", 1, 3, "write"),
        ("random", 1, 2, "claim"),
        ("deterministic", 0, 2, "keep"),
        ("random", 0, 3, "write"),
        ("deterministic", 0, 2, "judge"),
    ],
)
def test_a_killed_process_costs_its_batch(one, tmp_path, kind, victim, number, moment):
    """The first process goes on without another one; without the first one the others end, and three go on."""
    out, action = str(tmp_path / "out"), ("killed", (kind, str(tmp_path / "out"), victim, number, moment))
    codes, errors = processes(tmp_path, 2, action, store=f"file://{tmp_path}/store")
    # one that comes late finds nothing to do
    assert codes[victim] in (-signal.SIGKILL, 0), errors
    if victim == 1:
        assert codes[0] == 0 and result(tmp_path, "killed") == one[kind], errors
        return
    assert codes[0] == -signal.SIGKILL and codes[1] == 1 and "no sign of life of the first" in errors[1], errors
    done = torchrun(tmp_path, 3, ("report", (kind, out)))
    assert done.returncode == 0 and result(tmp_path, "report") == one[kind], done.stderr


def test_the_first_process_is_killed_and_its_store_with_it(one, tmp_path):
    out = str(tmp_path / "out")
    codes, errors = processes(tmp_path, 2, ("killed", ("random", out, 0, 2)))
    assert codes == [-signal.SIGKILL, 1] and "ProcessLost: process 1 of 2" in errors[1], errors
    # what was finished is not made again
    done = torchrun(tmp_path, 3, ("counted", ("random", out)))
    assert done.returncode == 0 and result(tmp_path, "counted")[0] == one["random"], done.stderr
    begun = sum(result(tmp_path, "counted", rank)[1] for rank in range(3))
    done = torchrun(tmp_path, 2, ("counted", ("random", str(tmp_path / "other"))))
    assert sum(result(tmp_path, "counted", rank)[1] for rank in range(2)) > begun


def test_torchrun_starts_again_what_was_killed(one, tmp_path):
    action = ("killed_once", ("deterministic", str(tmp_path / "out"), 1, 1))
    done = torchrun(tmp_path, 2, action, how=("--max-restarts", "1"))
    assert done.returncode == 0 and (tmp_path / "out" / "killed").exists(), done.stderr
    assert result(tmp_path, "killed_once") == one["deterministic"]


def test_one_that_was_stopped_ends_when_it_goes_on(one, tmp_path):
    began = time.monotonic()
    codes, errors = processes(
        tmp_path, 2, ("stopped", ("random", str(tmp_path / "out"))), store=f"file://{tmp_path}/store"
    )
    assert codes == [0, 0] and time.monotonic() - began < 60, errors
    assert result(tmp_path, "stopped") == one["random"]
    assert "process 1 gave no sign of life" in result(tmp_path, "stopped", 1)


def test_what_goes_wrong_in_one_process_is_raised_in_all(tmp_path):
    actions = [("failing", (1,)), ("different", ()), ("unseen", ())]
    done = torchrun(tmp_path, 2, *actions)
    assert done.returncode == 0, done.stderr
    failed = [result(tmp_path, "failing", rank) for rank in (0, 1)]
    assert failed == ["process 1 has no memory"] * 2
    different = [result(tmp_path, "different", rank) for rank in (0, 1)]
    assert different[0] == different[1] and "process 1 evaluates something else than the first (seed" in different[0]
    unseen = [result(tmp_path, "unseen", rank) for rank in (0, 1)]
    assert unseen[0] == unseen[1] and "does not see" in unseen[0] and "give out=FOLDER" in unseen[0]


def test_each_works_alone_if_asked(one, tmp_path):
    done = torchrun(tmp_path, 2, ("alone", ()))
    assert done.returncode == 0, done.stderr
    (first, own, shared), (nothing, others, _) = (result(tmp_path, "alone", rank) for rank in (0, 1))
    assert shared == one["deterministic"] and nothing is None
    assert {report["about"]["seed"] for report in (first, own, others)} == {"9", "0", "1"}


def test_the_command_by_torchrun(tmp_path):
    """The first process alone speaks and writes; a folder that is in use is refused in all of them."""
    words = "evaluate zoo:digits-pgd-at --images 20 --protocol fast --batch-size 4 --device cpu --out"
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]

    def run(how, out):
        command = [sys.executable, *how, "-m", "purify_fast", *words.split(), str(out)]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)

    assert run([], alone).returncode == 0
    done = run(several, shared)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Robustness, L-inf") == 1 and done.stdout.count("written:") == 1
    reports = [json.loads((folder / "report.json").read_text()) for folder in (alone, shared)]
    for report in reports:
        for row in report["rows"]:
            del row["seconds"]
    assert reports[0]["rows"] == reports[1]["rows"] and reports[0]["notes"] == reports[1]["notes"]
    assert (shared / "run.yaml").is_file() == (alone / "run.yaml").is_file()
    with folder_lock(shared):
        refused = run(several, shared)
    assert refused.returncode != 0 and "shared is written by another run" in refused.stderr
