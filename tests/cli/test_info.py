"""What `purify-fast info` tells."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import purify_fast
from purify_fast import __version__, _library
from purify_fast.cli import installation
from purify_fast.ops import REGISTRY, use_backend
from purify_fast.ops.dispatch import cache, verify
from purify_fast.ops.dispatch.op import Call

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_report_names_versions_build_and_every_op():
    text = installation.report()
    for part in (__version__, torch.__version__, "triton", "CPU", "GPU", "decode_samples"):
        assert part in text
    for name in REGISTRY:
        assert f"\n{name} " in text
    assert (_library.path or "none") in text
    if not torch.cuda.is_available():
        assert "GPU kernels are verified on your card at first use; they have not yet been raced on one" in text


def test_report_shows_a_forced_backend_and_a_missing_one():
    with use_backend("reference"):
        assert "forced" in installation.report()
    with use_backend("cpp"):
        text = installation.report()
    assert "forced" in text and "nothing" in text  # decode_samples has no kernel of the CPU


@pytest.mark.skipif(not _library.loaded(), reason="the CPU's kernels are the extension's")
def test_report_says_what_was_verified_and_what_is_wrong(tmp_path, monkeypatch, kernel_cache):
    rows = {line.split()[0]: line for line in installation.report().splitlines() if line}
    assert "cpp" in rows["philox"] and "verified at first use" in rows["philox"]
    found = {name: verify.verdict_of(REGISTRY[name], Call(CPU)) for name in ("philox", "stitch")}
    found["stitch"] = dataclasses.replace(found["stitch"], error=0.25, budget=0.0, case="3x3x32x32, float32")
    cache.update("verified", CPU, {name: dataclasses.asdict(verdict) for name, verdict in found.items()}, {})
    monkeypatch.setattr(verify, "_known", {})
    text = installation.report()
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert f"verified {found['philox'].date[:10]}, error " in rows["philox"]
    assert "the cpp kernel is WRONG here: an error of 0.25 where 0 is allowed (3x3x32x32, float32)" in rows["stitch"]
    assert str(tmp_path) in text.partition("verdicts")[2]


def info(**environment):
    """What the command prints in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "purify_fast", "info", "--all"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def test_an_extension_that_is_absent_names_the_command(monkeypatch):
    text = info(PURIFY_FAST_NO_EXTENSION="1")
    assert "switched off by PURIFY_FAST_NO_EXTENSION=1" in text and "the extension is not loaded" in text
    assert "PURIFY_FAST_NO_EXTENSION=1" in text.split("environment")[1]
    monkeypatch.setattr(_library, "load_error", ImportError(f"not installed: {_library.BUILD_HINT}"))
    monkeypatch.setattr(_library, "path", None)
    text = installation.report()
    assert "not loaded" in text and "pip install --no-build-isolation" in text


def test_an_extension_built_elsewhere_is_loaded(tmp_path):
    """PURIFY_FAST_EXTENSION is taken in place of the installed one; a broken one is told."""
    broken, copy = tmp_path / "broken.so", tmp_path / "_C.abi3.so"
    broken.write_text("no library")
    text = info(PURIFY_FAST_EXTENSION=str(broken))
    assert "not loaded" in text and str(broken) in text
    if _library.loaded():
        copy.write_bytes(Path(_library.path).read_bytes())
        text = info(PURIFY_FAST_EXTENSION=str(copy))
        assert "not loaded" not in text and "loaded" in text and str(copy) in text


def test_the_command_answers_in_a_few_lines(run):
    code, short = run("info")
    assert code == 0 and __version__ in short and torch.__version__ in short
    assert "kernels serve" in short and "purify-fast info --all" in short
    assert len(installation.summary().splitlines()) <= 12 < 20 < len(installation.report().splitlines())
    assert all(f"{name} " in run("info", "--all")[1] for name in ("philox", "stitch"))


def test_the_short_answer_names_wrong_kernels(monkeypatch):
    found = {name: verify.verdict_of(REGISTRY[name], Call(CPU)) for name in ("philox", "stitch")}
    found["stitch"] = dataclasses.replace(found["stitch"], error=1.0)
    monkeypatch.setattr(installation, "known_verdicts", lambda ops, device: found)
    assert "WRONG here, and therefore not used: stitch; please report it" in " ".join(installation.summary().split())


def test_the_copy_that_is_described_is_named(tmp_path, monkeypatch):
    """`python -m` looks in the current folder first: in a clone it describes the clone, and not what is installed."""
    this, installed = Path(purify_fast.__file__).resolve().parent, tmp_path.resolve() / "purify_fast"
    installed.mkdir()
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    monkeypatch.chdir(this.parent)
    text = " ".join(installation.summary().split())
    assert f"this copy {this}, because it is in the current folder, where `python -m` looks first. It hides the" in text
    assert str(installed) in text and "start in another folder, to hear of that one" in text
    monkeypatch.setattr(sys, "path", [str(this.parent), str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    text = " ".join(installation.report().split())
    assert f"this copy {this}. It comes first on Python's path (sys.path), and hides the copy in" in text
    assert str(installed) in text
    monkeypatch.setattr(sys, "path", [str(this.parent)])
    monkeypatch.setattr(sys, "meta_path", [])
    assert installation.copy() == str(this)


def test_an_editable_installation_is_found(tmp_path, monkeypatch):
    """It has a finder of its own, and no place on Python's path."""

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, None, origin=str(tmp_path / "purify_fast" / "__init__.py"))

    class Old:
        def find_module(self, name, path=None):
            return None

    monkeypatch.setattr(sys, "meta_path", [Old(), Finder])
    assert installation.other_copies() == [tmp_path.resolve() / "purify_fast"]


def test_both_answers_say_that_triton_has_no_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for text in (installation.summary(), installation.report()):
        assert "there is no C compiler: neither gcc nor clang is on the PATH" in " ".join(text.split())
