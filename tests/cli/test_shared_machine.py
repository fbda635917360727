"""On a machine that others use, a command's threads wait passively."""

import os
import sys

from purify_fast import cli


def test_the_program_lets_its_threads_wait_passively(run, monkeypatch):
    for name in cli.WAITING:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert run("zoo")[0] == 0 and "OMP_WAIT_POLICY" not in os.environ, "a caller of main keeps its environment"
    monkeypatch.setattr(sys, "argv", ["purify-fast", "zoo"])
    assert cli.main() == 0 and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
