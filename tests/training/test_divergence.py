"""A training that diverges: when it is seen, and that its last checkpoint stays."""

import math

import pytest
import torch
from small_runs import images

from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit
from purify_fast.training.loop import INTERVAL
from purify_fast.training.run import CHECKPOINT, read_tree


class Fragile(ClassifierTask):
    """Its loss at a step, or the gradient of it, is not finite."""

    def __init__(self, at, how="loss"):
        torch.manual_seed(0)
        super().__init__(SmallCNN(1, 2, (8, 8), 2), ClassifierConfig())
        self.at, self.how, self.seen = at, how, []

    def training_step(self, batch):
        loss, metrics = super().training_step(batch)
        self.seen.append(batch)
        if batch.step != self.at:
            return loss, metrics
        weight = next(self.model.parameters()).flatten()[0]
        # the second is finite itself
        return (loss * math.nan if self.how == "loss" else loss + (weight - weight.detach()).abs().sqrt()), metrics


def test_it_is_seen_at_the_next_look_without_a_checkpoint():
    """An epoch of 1,000 steps and no folder: nothing else would wait for the device before its end."""
    task = Fragile(30)
    with pytest.raises(FloatingPointError, match=r"epoch 0: training diverged before step 100, a loss or a weight"):
        fit(task, *images(2000), FitConfig(1, 2), progress=False)
    assert len(task.seen) == INTERVAL


def test_statistics_that_are_not_finite_never_enter_a_checkpoint(tmp_path):
    """Finite losses and weights, but a BatchNorm whose statistics overflowed."""

    class Overflowing(Fragile):
        def after_step(self):
            self.model.norm.running_var.fill_(math.inf)

    task = Overflowing(999)
    task.model.norm = torch.nn.BatchNorm1d(2)
    with pytest.raises(FloatingPointError, match="a weight is not finite"):
        fit(task, *images(), FitConfig(1, 16), tmp_path, progress=False)
    assert not (tmp_path / CHECKPOINT).is_file()


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("at", [1, 5])
def test_what_is_not_finite_never_enters_a_checkpoint(tmp_path, how, at):
    config = FitConfig(3, 16, checkpoint_seconds=0)
    with pytest.raises(FloatingPointError, match=r"training diverged"):
        fit(Fragile(at, how=how), *images(), config, tmp_path, progress=False)
    saved = read_tree(tmp_path / CHECKPOINT)
    assert saved["step"] == at
    assert all(value.isfinite().all() for value in (*saved["model"].values(), *saved["sums"].values()))
    healthy = Fragile(math.inf)
    last = fit(healthy, *images(), config, tmp_path, progress=False)
    assert math.isfinite(last["loss"]) and all(weight.isfinite().all() for weight in healthy.model.parameters())
