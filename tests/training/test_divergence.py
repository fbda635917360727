"""A training that diverges: when it is seen, what is written down, and how it goes on with a smaller rate."""

import logging
import math

import numpy as np
import pytest
import torch
from small_runs import images

from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit
from purify_fast.training.checkpoint import CHECKPOINT, read_tree
from purify_fast.training.run import INTERVAL, Diverged, LossWatch
from purify_fast.training.sources import InMemory, step_seed

pytestmark = pytest.mark.usefixtures("one_thread")


class Fragile(ClassifierTask):
    """Diverges at a step while its learning rate is above a limit."""

    def __init__(self, at, limit=0.0):
        torch.manual_seed(0)
        super().__init__(SmallCNN(1, 2, (8, 8), 2), ClassifierConfig())
        self.at, self.limit, self.seen, self.rates = at, limit, [], []

    def training_step(self, batch):
        loss, metrics = super().training_step(batch)
        self.seen.append(batch)
        rate = self.optimizer.param_groups[0]["lr"]
        self.rates.append(rate)
        return loss * (math.nan if batch.seed == step_seed(0, self.at) and rate > self.limit else 1.0), metrics


def test_the_step_is_found_and_its_images_are_kept(tmp_path):
    task, (x, y) = Fragile(5), images()
    with pytest.raises(Diverged, match=r"the loss of step 5 is not finite .*; the last checkpoint is kept") as told:
        fit(task, x, y, FitConfig(3, 16, padding=1), tmp_path, progress=False)
    text = str(told.value)
    assert f"its images, labels and seed are in {tmp_path / 'diverged.npz'}" in text
    assert "Lower the learning rate" in text and "on_nan back_off halves the rate" in text
    with np.load(tmp_path / "diverged.npz") as kept:
        ids = torch.from_numpy(kept["indices"])
        assert torch.equal(ids, task.seen[5].sample_ids)
        assert np.array_equal(kept["images"], x[ids].numpy()) and np.array_equal(kept["labels"], y[ids].numpy())
        assert (kept["seed"], kept["step"], kept["epoch"]) == (step_seed(0, 5), 5, 1)
    assert all(value.isfinite().all() for value in read_tree(tmp_path / CHECKPOINT)["model"].values())


def test_it_is_seen_at_the_next_look_without_a_checkpoint(tmp_path):
    """An epoch of 1,000 steps and no folder: nothing else would wait for the device before its end."""
    task = Fragile(30)
    with pytest.raises(Diverged, match=r"the loss of step 30 is not finite"):
        fit(task, *images(1000), FitConfig(1, 1), progress=False)
    assert len(task.seen) == INTERVAL


def test_the_first_of_several_is_named_after_many_looks():
    x, y = images()
    watch = LossWatch(InMemory(x, y, FitConfig(1, 16), 0, 1), 0)
    with pytest.raises(Diverged) as raised:
        for step in range(3 * INTERVAL):
            watch.add(step, torch.tensor(math.inf if step >= INTERVAL + 3 else 1.0), (x, y, y))
    assert step == 2 * INTERVAL - 1 and raised.value.step == watch.first_bad() == INTERVAL + 3


def test_batches_of_a_loader_are_held_for_the_record(tmp_path):
    x, y = images()
    loader = [(x[i : i + 16].float() / 255, y[i : i + 16]) for i in range(0, 64, 16)]
    task = Fragile(6)
    with pytest.raises(Diverged, match=r"diverged\.npz"):
        fit(task, loader, None, FitConfig(3), tmp_path, progress=False)
    with np.load(tmp_path / "diverged.npz") as kept:
        assert np.array_equal(kept["images"], loader[2][0].numpy())


def test_a_run_backs_off_and_ends_well(tmp_path, caplog):
    peak = ClassifierConfig().learning_rate
    task = Fragile(6, limit=0.3 * peak)
    with caplog.at_level(logging.WARNING, "purify_fast"):
        last = fit(task, *images(), FitConfig(3, 16, on_nan="back_off"), tmp_path, progress=False)
    assert math.isfinite(last["loss"])
    assert [text for text in ("0.5 of the learning rate", "0.25 of the learning rate") if text in caplog.text]
    saved = read_tree(tmp_path / CHECKPOINT)
    assert saved["step"] == 12 and saved["rate"] in (0.5, 0.25)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_a_run_that_diverges_at_once_begins_anew_and_gives_up_after_five_times(tmp_path, caplog):
    task = Fragile(0)
    with caplog.at_level(logging.WARNING, "purify_fast"), pytest.raises(Diverged, match="the loss of step 0"):
        fit(task, *images(), FitConfig(1, 16, on_nan="back_off"), tmp_path, progress=False)
    assert caplog.text.count("back to step 0 with") == 5


def test_backing_off_needs_a_folder():
    with pytest.raises(ValueError, match="on_nan 'back_off' goes back to a checkpoint: give a folder"):
        fit(Fragile(0), *images(), FitConfig(1, 16, on_nan="back_off"), progress=False)


def test_a_run_that_diverged_may_be_resumed_with_back_off(tmp_path):
    with pytest.raises(Diverged):
        fit(Fragile(6), *images(), FitConfig(3, 16), tmp_path, progress=False)
    task = Fragile(6, limit=0.6 * 3e-3)
    fit(task, *images(), FitConfig(3, 16, on_nan="back_off"), tmp_path, progress=False)
    assert read_tree(tmp_path / CHECKPOINT)["step"] == 12


def test_statistics_that_are_not_finite_never_enter_a_checkpoint(tmp_path):
    """Finite losses and weights, but a BatchNorm whose statistics overflowed."""

    class Overflowing(Fragile):
        def after_step(self):
            for name, buffer in self.model.named_buffers():
                if name.endswith("running_var"):
                    buffer.fill_(math.inf)

    task = Overflowing(999)
    task.model.append_norm = torch.nn.BatchNorm1d(2)
    with pytest.raises(Diverged, match="a weight is not finite"):
        fit(task, *images(), FitConfig(1, 16), tmp_path, progress=False)
    assert not (tmp_path / CHECKPOINT).is_file()


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
    assert all(value.isfinite().all() for value in (*saved["model"].values(), *saved["sums"].values()))
    healthy = Diverging(math.inf, how)
    last = fit(healthy, *images(), config, tmp_path, progress=False)
    assert math.isfinite(last["loss"]) and all(weight.isfinite().all() for weight in healthy.model.parameters())
