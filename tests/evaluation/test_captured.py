"""An evaluation whose attacks are captured: the same rows; a function stands for a CUDA graph."""

from __future__ import annotations

import importlib

import pytest
import torch

from purify_fast.attacks import APGD, PGD
from purify_fast.evaluation import evaluate
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed import StepGraphs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_evaluation_hands_captured_steps_to_its_attacks(rerun, monkeypatch):
    made = []

    def graphs(mode):
        made.append(StepGraphs(mode, capture=rerun))
        return made[-1]

    # the module, whose name is also that of a function of the package
    monkeypatch.setattr(importlib.import_module("purify_fast.evaluation.runner"), "StepGraphs", graphs)
    torch.manual_seed(0)
    model, x = SmallCNN(width=4).eval(), torch.rand(12, 1, 16, 16)
    y = model(x).argmax(1)
    rows = []
    for mode in ("off", "always"):
        found = evaluate(
            model, x, y, eps=0.05, attacks=[PGD(steps=25), APGD(steps=25)], batch_size=8, cuda_graphs=mode,
            progress=False,
        )  # fmt: skip
        rows.append([row.robust.tolist() for row in found.rows])
        # of each attack two batches, the last one smaller; of APGD perhaps more, when images leave
        assert rerun.recorded == 0 if mode == "off" else rerun.recorded >= 3
    assert rows[0] == rows[1] and [one.mode for one in made] == ["off", "always"]
