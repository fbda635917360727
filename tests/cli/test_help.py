"""--help comes at once, without PyTorch, and `info` tells what is installed."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from purify_fast import _library, cli
from purify_fast.cli import installation
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import records, verify

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
    for unread in ("{None}", "[INT", "(default: None)", "(default: )"):
        assert unread not in done.stdout


def test_the_help_of_each_command_ends_with_an_example_that_is_read(monkeypatch, capsys):
    ran = []
    monkeypatch.setenv("COLUMNS", "200")
    for name, kind in cli._KINDS.items():
        with pytest.raises(SystemExit, match="0"):
            cli.main([*name.split(), "--help"])
        *_, example, pages = capsys.readouterr().out.splitlines()
        assert example.startswith(f"Example: purify-fast {name} ") and pages.startswith("Pages: https://")
        monkeypatch.setattr(kind, "run", lambda self: ran.append(self))
        monkeypatch.setattr(kind, "writes", lambda self: None)
        assert cli.main(shlex.split(example)[2:]) == 0
    assert len(ran) == len(cli._KINDS)


def test_the_program_is_run_as_a_module_and_tells_its_version():
    command = [sys.executable, "-m", "purify_fast", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout == "purify-fast 0.1.0\n"


CPU = torch.device("cpu")


def rows_of(text):
    """Return the text of each op. A line that begins with spaces continues the line before."""
    rows = [" ".join(row.split()) for row in re.split(r"\n(?=\S)", text)]
    return {row.split()[0]: row for row in rows if row}


@pytest.mark.skipif(not _library.loaded(), reason="the CPU's kernels are the extension's")
def test_report_says_what_was_verified_and_what_is_wrong(tmp_path, monkeypatch, kernel_cache):
    rows = rows_of(installation.info(True))
    assert "cpp" in rows["philox"] and "verified at first use" in rows["philox"]
    verdicts = {name: verify.verdict_of(REGISTRY[name], CPU) for name in ("philox", "stitch")}
    verdicts["stitch"] = dataclasses.replace(verdicts["stitch"], error=0.25, budget=0.0, case="3x3x32x32, float32")
    sources = {name: REGISTRY[name].code_hash("cpu") for name in verdicts}
    records.update(CPU, {n: {"sources": sources[n], "verdict": dataclasses.asdict(v)} for n, v in verdicts.items()})
    records._contents.clear()
    text = installation.info(True)
    assert "WRONG here, and therefore not used: stitch; please report it" in installation.info(False)
    rows = rows_of(text)
    assert max(map(len, text.partition("aggregate on")[2].splitlines())) <= 100
    assert f"verified {verdicts['philox'].date[:10]}, error " in rows["philox"]
    assert "the cpp kernel is WRONG here: an error of 0.25 where 0 is allowed (3x3x32x32, float32)" in rows["stitch"]
    assert str(tmp_path) in text.partition("verdicts")[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PURIFY_FAST_EXTENSION", "PURIFY_FAST_NO_EXTENSION"])
def test_an_extension_that_is_absent_or_broken_is_told(tmp_path, name):
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    value, why = ("1", "switched off by") if name.startswith("PURIFY_FAST_NO") else (str(broken), str(broken))
    command, environment = [sys.executable, "-m", "purify_fast", "info", "--all"], {**os.environ, name: value}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    text = " ".join(done.stdout.split())
    assert f"{name}={value}" in text.split("environment ")[1], done.stderr
    assert "the extension is not loaded" in text and why in text
