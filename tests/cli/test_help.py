"""--help comes at once, without PyTorch, and explains every option in words of its own."""

import argparse
import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tyro

from purify_fast import cli
from purify_fast.cli.parsing import MARKERS, option_types
from purify_fast.data import folders
from purify_fast.evaluation import EvaluateConfig

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(cli._KINDS)


def options(kind):
    """The options of a command, as argparse holds them."""
    parser = tyro.extras.get_parser(kind, config=MARKERS, registry=option_types())
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def test_a_warning_of_this_package_is_one_line(monkeypatch):
    """A warning of other code keeps its place, and after the command all warnings do."""
    written = []

    def warn(self):
        for place in (folders.__file__, "/elsewhere/other.py"):
            written.append(warnings.formatwarning("2 images", UserWarning, place, 9, "call()"))

    monkeypatch.setattr(cli._KINDS["zoo"], "run", warn)
    before = warnings.formatwarning
    assert cli.main(["zoo"]) == 0 and warnings.formatwarning is before
    assert written == ["purify-fast: 2 images\n", "/elsewhere/other.py:9: UserWarning: 2 images\n  call()\n"]


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


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_explained_in_its_own_words(name):
    found = options(cli._KINDS[name])
    assert found
    helps = {}
    for action in found:
        text = str(action.help).split("(default")[0].strip()
        assert len(text) > 8, (name, action.dest, text)
        assert text not in helps, (name, action.dest, helps[text])
        helps[text] = action.dest


def test_evaluate_takes_every_setting_of_an_evaluation():
    found = {action.dest for action in options(cli.Evaluate)}
    assert {f"settings.{field.name.replace('_', '-')}" for field in dataclasses.fields(EvaluateConfig)} <= found


def test_the_program_is_run_as_a_module_and_tells_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "purify_fast", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout == "purify-fast 0.1.0\n"
