"""What a checkpoint must never hold, and what is said of one that is another run's."""

import math

import pytest
import torch
from small_runs import images

from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit
from purify_fast.training.checkpoint import read_tree
from purify_fast.training.step import finite

pytestmark = pytest.mark.usefixtures("one_thread")


class Diverging(ClassifierTask):
    """Its loss is not a number from a step on, or its gradient at that step."""

    def __init__(self, at, how):
        torch.manual_seed(0)
        super().__init__(SmallCNN(1, 2, (8, 8), 4), ClassifierConfig())
        self.at, self.how, self.steps = at, how, 0

    def training_step(self, batch):
        loss, metrics = super().training_step(batch)
        self.steps += 1
        if self.steps >= self.at and self.how == "loss":
            loss = loss * math.nan
        if self.steps == self.at and self.how == "gradient":
            # finite itself, with an infinite gradient
            weight = next(self.model.parameters()).flatten()[0]
            loss = loss + (weight - weight.detach()).abs().sqrt()
        return loss, metrics


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("at", [2, 6])
def test_what_is_not_finite_never_enters_a_checkpoint(tmp_path, how, at):
    """A timed checkpoint in the middle of an epoch once kept it, after which every resume failed for good."""
    config = FitConfig(3, 16, checkpoint_seconds=0)
    with pytest.raises(FloatingPointError, match=r"training diverged, .*; the last checkpoint is kept"):
        fit(Diverging(at, how), *images(), config, tmp_path, progress=False)
    saved = read_tree(tmp_path / "checkpoint.safetensors")
    assert saved["step"] == at - 1
    assert finite([*saved["model"].values(), *saved["sums"].values()])
    healthy = Diverging(math.inf, how)
    last = fit(healthy, *images(), config, tmp_path, progress=False)
    assert math.isfinite(last["loss"]) and finite(healthy.model.parameters())


def test_another_kind_of_run_is_named(tmp_path):
    classifier = SmallCNN(1, 2, (8, 8), 4)
    carso = CarsoTask(Carso(classifier, ["hidden"], (1, 8, 8), 4, 3, 2, decoder_width=2), CarsoConfig(kl_delay=0.0))
    fit(carso, *images(), FitConfig(1, 16), tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds a CARSO run, and this is a classifier's run: give another folder, or"):
        fit(ClassifierTask(classifier, ClassifierConfig()), *images(), FitConfig(1, 16), tmp_path, progress=False)
