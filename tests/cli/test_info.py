"""What `purify-fast info` tells."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from purify_fast import __version__, _library
from purify_fast.cli import installation
from purify_fast.ops import REGISTRY, use_backend
from purify_fast.ops.dispatch import records, verify

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_report_names_versions_every_op_and_the_kernels_of_a_forced_backend(run):
    code, text = run("info", "--all")
    assert code == 0 and all(part in text for part in (__version__, torch.__version__, *REGISTRY))
    with use_backend("cpp"):
        # decode_samples has no kernel of the CPU
        assert "forced" in (text := installation.info(True)) and "nothing" in text
    with use_backend("triton"):
        assert f"on cpu, kernels compute 0 of {len(REGISTRY)} ops" in " ".join(installation.info(False).split())


@pytest.mark.skipif(not _library.loaded(), reason="the CPU's kernels are the extension's")
def test_report_says_what_was_verified_and_what_is_wrong(tmp_path, monkeypatch, kernel_cache):
    rows = {line.split()[0]: line for line in installation.info(True).splitlines() if line}
    assert "cpp" in rows["philox"] and "verified at first use" in rows["philox"]
    verdicts = {name: verify.verdict_of(REGISTRY[name], CPU) for name in ("philox", "stitch")}
    verdicts["stitch"] = dataclasses.replace(verdicts["stitch"], error=0.25, budget=0.0, case="3x3x32x32, float32")
    sources = {name: REGISTRY[name].code_hash("cpu") for name in verdicts}
    records.update(CPU, {n: {"sources": sources[n], "verdict": dataclasses.asdict(v)} for n, v in verdicts.items()})
    records.forget()
    text = installation.info(True)
    assert "WRONG here, and therefore not used: stitch; please report it" in installation.info(False)
    rows = {line.split()[0]: line for line in text.splitlines() if line}
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
