"""A training whose accuracy collapses returns to its last good checkpoint."""

import logging

import pytest
import torch
from small_runs import images

from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit
from purify_fast.training.checkpoint import CHECKPOINT, GOOD, read_tree
from purify_fast.training.loss_watch import Diverged

pytestmark = pytest.mark.usefixtures("one_thread")


class Collapsing(ClassifierTask):
    """Its accuracy falls to nothing in an epoch, while its learning rate is above a limit."""

    def __init__(self, epoch, limit):
        torch.manual_seed(0)
        super().__init__(SmallCNN(1, 2, (8, 8), 2), ClassifierConfig())
        self.epoch, self.limit, self.now, self.rate, self.good = epoch, limit, 0, 1.0, {}

    def learning_rate(self, progress, epoch, epochs):
        self.now = epoch
        return 1e-3

    def validate(self, batch):
        collapsed = self.now >= self.epoch and self.optimizer.param_groups[0]["lr"] > self.limit
        return {"loss": torch.tensor(1.0), "accuracy": torch.tensor(0.3 if collapsed else 0.7)}


CONFIG = {"epochs": 4, "batch_size": 16, "validation_share": 0.25}


def test_a_run_that_collapses_goes_on_from_the_last_good_checkpoint(tmp_path, caplog):
    task = Collapsing(2, limit=0.3e-3)
    with caplog.at_level(logging.WARNING, "purify_fast"):
        last = fit(task, *images(), FitConfig(**CONFIG, on_collapse="back_off"), tmp_path, progress=False)
    assert caplog.text.count("the accuracy on held-out images fell to 0.300") == 2
    assert "from step 6 with 0.25 of the learning rate" in caplog.text
    saved = read_tree(tmp_path / CHECKPOINT)
    assert last["validation_accuracy"] == pytest.approx(0.7) and saved["rate"] == 0.25
    assert [row["epoch"] for row in saved["rows"]] == [0, 1, 2, 3]
    assert read_tree(tmp_path / GOOD)["step"] == saved["step"] == 12


def test_the_good_checkpoint_is_of_before_the_collapse(tmp_path):
    """A checkpoint in the middle of the bad epoch is not what the run returns to."""
    seen = []

    class Watched(Collapsing):
        def training_step(self, batch):
            seen.append((batch.step, float(next(self.model.parameters()).detach().sum())))
            return super().training_step(batch)

    config = FitConfig(**CONFIG, on_collapse="back_off", checkpoint_seconds=0)
    fit(Watched(2, limit=0.6e-3), *images(), config, tmp_path, progress=False)
    steps = [step for step, _ in seen]
    assert steps == [*range(9), *range(6, 12)]
    # the weights of step 6 are the same both times
    assert seen[6][1] == seen[9][1] and seen[7][1] != seen[10][1]


def test_a_run_gives_up_after_five_times_and_says_what_it_needs(tmp_path):
    config = FitConfig(**CONFIG, on_collapse="back_off")
    with pytest.raises(Diverged, match=r"training collapsed.* at 0\.03125 of the learning rate"):
        fit(Collapsing(1, limit=0.0), *images(), config, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"on_collapse 'back_off'.* folder=None"):
        fit(Collapsing(1, limit=0.0), *images(), config, progress=False)
    with pytest.raises(ValueError, match=r"on_collapse 'back_off'.*validation_share"):
        fit(Collapsing(1, limit=0.0), *images(), FitConfig(3, 16, on_collapse="back_off"), tmp_path, progress=False)


def test_a_task_that_measures_no_accuracy_is_refused(tmp_path):
    class Silent(Collapsing):
        def validate(self, batch):
            return {"loss": torch.tensor(1.0)}

    with pytest.raises(ValueError, match=r"on_collapse 'back_off' needs .*accuracy; this training measures loss"):
        fit(Silent(1, 0.0), *images(), FitConfig(**CONFIG, on_collapse="back_off"), tmp_path, progress=False)
