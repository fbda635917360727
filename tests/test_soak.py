"""What the soak disturbs, and what it takes for a loss; the soak itself takes half an hour."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import soak

from purify_fast import _library, cli
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import races, registry
from purify_fast.ops.dispatch.op import Call


def test_every_command_that_writes_is_disturbed_and_its_options_are_there(tmp_path):
    every = {command.name: command for command in soak.commands(tmp_path / "data.npz", tmp_path)}
    writing = {name for name, kind in cli._KINDS.items() if name not in ("recipe", "report", "zoo", "info")}
    assert every.keys() == writing
    for command in every.values():
        read = cli._read([*command.words, *((command.out, str(tmp_path / "out")) if command.out else ())])
        if command.out:
            assert read.writes() == command.folder(tmp_path / "out")


@pytest.fixture
def cache(kernel_cache, monkeypatch):
    """A folder of races, empty, and a process that has decided nothing."""
    if not _library.loaded():
        pytest.skip("the CPU's kernels are the extension's")
    monkeypatch.setattr(soak, "RACED", ("sample_latent",))
    return kernel_cache


def test_what_serves_after_a_race_is_judged(cache, monkeypatch):
    cpu, op = torch.device("cpu"), REGISTRY["sample_latent"]
    assert soak.wrongly_served(cache) == []
    cells = {"": {"eager": "cpp"}, "float32 small": {"eager": "reference"}}
    entry = {"sources": op.sources_digest("cpu"), "cells": cells}
    path = races.write(cpu, {"sample_latent": entry}, {"date": "2026-01-01"})
    registry.forget()
    assert soak.wrongly_served(cache) == []
    # another serves than the file says
    op.served[Call(cpu, "", torch.float32, 16)] = "cpp"
    assert soak.wrongly_served(cache) == ["sample_latent float32 small is served by cpp, and its file says reference"]
    path.write_text(json.dumps(entry)[:20])
    races.forget()
    assert [text for text in soak.wrongly_served(cache) if text.startswith(f"{path.name} is not whole")]
    path.unlink()
    races.forget()

    def wrong(self, *given, variant=""):
        return [one + 1 for one in self.reference(*given)]

    monkeypatch.setattr(type(op), "__call__", wrong)
    assert any("sample_latent" in text and "errs by" in text for text in soak.wrongly_served(cache))


def test_results_leave_out_times_and_what_leads_to_them(tmp_path):
    command = next(one for one in soak.commands(tmp_path / "d", tmp_path) if one.name == "train classifier")
    for name, content in {
        "model.safetensors": "weights", "checkpoint.safetensors": "not compared", ".half-x": "nor this",
        "log.jsonl": '{"step": 1, "loss": 2.0, "images_per_second": 3.0}\n', "rows/a.json": "nor this",
        "report.json": '{"rows": [{"robust": [1], "seconds": 4.0}], "date": "now"}', "a.csv": "x,y\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert soak.results(command, tmp_path) == {
        "model.safetensors": b"weights", "log.jsonl": [{"step": 1, "loss": 2.0}], "a.csv": "x,y\n",
        "report.json": {"rows": [{"robust": [1]}]},
    }  # fmt: skip


def test_memory_that_grows_is_seen():
    flat, grows = [100, 150, 150, 151, 150, 150], [100, 110, 120, 130, 140, 150]
    assert abs(soak.growth(flat)) < 0.01 and soak.growth(grows) > 0.03 and soak.growth([1]) == 0.0
