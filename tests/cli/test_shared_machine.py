"""On a machine that others use, a command's threads wait passively, and are no more than the cores it may use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from purify_fast import cli

#: Tells, when PyTorch is loaded, how its threads will wait.
LOOKING = """
import sys
class Look:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            import os
            print("torch is loaded", os.environ.get("OMP_WAIT_POLICY"))
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Look())
sys.argv = ["purify-fast", "zoo"]
"""


def test_waiting_is_passive_before_torch_is_loaded():
    kept = {name: value for name, value in os.environ.items() if name not in cli.WAITING}
    kept["PYTHONPATH"] = str(Path(cli.__file__).parents[2])
    command = [sys.executable, "-c", f"{LOOKING}from purify_fast.cli import main; main()"]
    printed = subprocess.run(command, env=kept, capture_output=True, text=True, check=True).stdout
    assert "torch is loaded PASSIVE\n" in printed


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
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("5:memory:/a\n", {"cpu.max": "100000 100000\n"}, 8),
        ("0::/../elsewhere\n", {"cpu.max": "300000 100000\n"}, 3),
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
