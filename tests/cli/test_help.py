"""--help comes at once, without PyTorch. On a machine that others use, threads wait passively."""

import os
import subprocess
import sys
from pathlib import Path

from purify_fast import cli

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(cli._KINDS)


def test_help_comes_without_pytorch():
    """For every command, in one process: what one of them imported would be seen after the next."""
    code = f"""
import sys
from purify_fast import cli
for name in {[*NAMES, "", "train"]!r}:
    try:
        cli.main([*name.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    loaded = {{name.split(".")[0] for name in sys.modules}} & {{"torch", "torchvision", "numpy", "tqdm"}}
    assert not loaded, (name, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name in (*NAMES, "", "train"):
        assert f"usage: purify-fast {name}".strip() in done.stdout


def test_the_program_is_run_as_a_module_and_tells_its_version():
    command = [sys.executable, "-m", "purify_fast", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout == "purify-fast 0.1.0\n"


def test_the_program_lets_its_threads_wait_passively(run, monkeypatch):
    for name in cli.WAITING:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert run("zoo")[0] == 0 and "OMP_WAIT_POLICY" not in os.environ, "a caller of main keeps its environment"
    monkeypatch.setattr(sys, "argv", ["purify-fast", "zoo"])
    assert cli.main() == 0 and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
