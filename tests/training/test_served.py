"""A resumed run says that it began with other kernels."""

import pytest
import torch
from small_runs import StopAt, Stopped

from purify_fast import _library
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import records, registry
from purify_fast.ops.dispatch.op import Call
from purify_fast.training import FitConfig, fit
from purify_fast.training.config import TrainingAttack

CPU, SHAPE = torch.device("cpu"), (1, 16, 16)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not _library.loaded(), reason="the CPU's kernels are the extension's"),
]


def train(folder, callbacks=()) -> dict[str, torch.Tensor]:
    """The weights after three epochs of ARREST, whose distance differs between backends in the last bits."""
    torch.manual_seed(0)
    attack = TrainingAttack(eps=0.1, steps=2)
    task = ArrestTask(SmallCNN(width=4), ArrestConfig(attack=attack, replay=False), SHAPE)
    x = torch.randint(256, (32, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    fit(task, x, torch.arange(32) % 10, FitConfig(epochs=3, batch_size=16), folder, progress=False, callbacks=callbacks)
    return task.model.state_dict()


def test_a_race_between_two_parts_of_a_run_is_said(tmp_path, kernel_cache, caplog):
    whole = train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "parts", [StopAt(3)])
    names = ("representation_distance", "representation_distance_backward", "pgd_step")
    cells = {"": {"eager": "reference"}}
    lost = {name: {"sources": REGISTRY[name].code_hash("cpu"), "cells": cells} for name in names}
    records.update(CPU, lost, date="2026-01-02")
    registry.forget_choices()
    other = train(tmp_path / "other")
    assert REGISTRY[names[0]].serving(Call(CPU)) == "reference"
    train(tmp_path / "parts")
    assert not all(torch.equal(whole[name], other[name]) for name in whole), "the race would have changed bits"
    assert sum("this run began with other kernels" in record.message for record in caplog.records) == 1
    # a folder without a checkpoint begins anew, with the kernels of today
    (tmp_path / "parts" / "checkpoint.safetensors").unlink()
    assert all(torch.equal(other[name], value) for name, value in train(tmp_path / "parts").items())
