"""On a machine that others use, a command's threads wait passively, and are no more than the cores it may use."""

import os
import sys

import pytest
import torch

from purify_fast import cli


def test_the_program_lets_its_threads_wait_passively(monkeypatch):
    for name in cli.WAITING:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["purify-fast", "zoo"])
    assert cli.main() == 0 and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_caller_of_main_keeps_its_environment_and_threads(run, monkeypatch):
    for name in (*cli.WAITING, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before, inside = torch.get_num_threads(), []
    monkeypatch.setattr(cli, "allowed_cores", lambda: 1)
    monkeypatch.setattr(cli._KINDS["zoo"], "run", lambda self: inside.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        assert run("zoo")[0] == 0
        assert inside == [1] and torch.get_num_threads() == 2 and "OMP_WAIT_POLICY" not in os.environ
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert run("zoo")[0] == 0 and inside == [1, 2]
    finally:
        torch.set_num_threads(before)


def machine(root, groups, files):
    """The files of a machine: the groups of this process, and the files of the groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
    ],
)
def test_cores_by_the_quota(tmp_path, monkeypatch, groups, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert cli.allowed_cores(machine(tmp_path, groups, files)) == cores


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the affinity")
def test_cores_by_the_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    assert cli.allowed_cores(tmp_path) == 2
