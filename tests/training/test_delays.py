"""Delayed terms of a loss: refused where they never act, told in the log, and epochs of other lengths."""

import json

import pytest
import torch
from small_runs import StopAt, Stopped, carso_task, on_step

from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.models import build_classifier
from purify_fast.training import FitConfig, fit
from purify_fast.training.sources import InMemory
from purify_fast.training.task import RunLength


def images(count=12):
    torch.manual_seed(0)
    return (255 * torch.rand(count, 3, 8, 8)).to(torch.uint8), torch.arange(count) % 10


def atop(**settings):
    torch.manual_seed(0)
    defence = Atop(build_classifier("small_cnn", (3, 8, 8), 10, width=2), SmallGenerator(3, width=4), (3, 8, 8))
    return AtopTask(defence, AtopConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "epochs", "message"),
    [
        # 3 steps an epoch of 4 images
        ({"cls_delay": 2, "cls_delay_unit": "epochs"}, 2, "cls_delay is too long: .* begin in step 7"),
        ({"cls_delay": 6, "cls_delay_unit": "steps"}, 2, "would begin in step 7 of 6"),
        ({"cls_delay": 21, "cls_delay_unit": "images"}, 2, "would begin in step 7 of 6"),
        ({}, 1, "cls_delay is too long"),
    ],
)
def test_a_term_that_never_acts_is_refused_before_the_run(settings, epochs, message, tmp_path):
    x, y = images()
    with pytest.raises(ValueError, match=message):
        fit(atop(**settings), x, y, FitConfig(epochs, 4), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    # a delay that is one shorter leaves the last step
    shorter = {"cls_delay": 5, "cls_delay_unit": "steps"}
    assert "cross_entropy" in fit(atop(**shorter), x, y, FitConfig(2, 4), progress=False)
    assert "cross_entropy" not in fit(atop(cls_weight=0.0), x, y, FitConfig(1, 4), progress=False)


@pytest.mark.parametrize(("settings", "epochs"), [({}, 2), ({"kl_delay": 0.75}, 4)])
def test_a_kl_term_that_never_acts_is_refused(settings, epochs):
    with pytest.raises(ValueError, match="kl_delay is too long"):
        carso_task(**settings).terms(RunLength(epochs, 2, 8, 16))


def test_the_log_says_from_which_step_on_a_term_acts(tmp_path):
    x, y = images()
    task = atop(cls_delay=9, cls_delay_unit="images")
    fit(task, x, y, FitConfig(2, 4), tmp_path, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # 8 images are behind step 2, 12 behind step 3: the term acts in the second epoch alone
    assert all(row["acts_from_step"] == {"cross_entropy": 3} for row in rows)
    assert ["cross_entropy" in row for row in rows] == [False, True]


def test_a_metric_is_the_mean_over_the_steps_that_measure_it_also_after_a_resume(tmp_path):
    """The term acts from the second of three steps on: its mean is over two."""
    x, y = images()
    seen = []
    settings = {"cls_delay": 1, "cls_delay_unit": "steps"}
    watch = on_step(lambda state: seen.append(state.metrics.get("cross_entropy")))
    last = fit(atop(**settings), x, y, FitConfig(1, 4), progress=False, callbacks=[watch])
    assert seen[0] is None and last["cross_entropy"] == pytest.approx(float(sum(seen[1:])) / 2) and len(seen) == 3

    config = FitConfig(1, 4, checkpoint_seconds=0)
    with pytest.raises(Stopped):
        fit(atop(**settings), x, y, config, tmp_path, progress=False, callbacks=[StopAt(3)])
    assert fit(atop(**settings), x, y, config, tmp_path, progress=False) == last


def test_the_last_batch_is_kept_if_asked_and_epochs_are_cut_off():
    x, y = images(10)
    whole = InMemory(x, y, FitConfig(1, 4, drop_last=False), x.device)
    assert (whole.steps, whole.images) == (3, 10)
    sizes = [len(ids) for _, _, ids in whole.epoch(0, 0)]
    assert sizes == [4, 4, 2]
    cut = InMemory(x, y, FitConfig(3, 4, steps_per_epoch=1), x.device)
    epochs = [torch.cat([ids for _, _, ids in cut.epoch(k, 0)]) for k in range(3)]
    assert all(len(ids) == 4 for ids in epochs) and (cut.steps, cut.images) == (1, 4)
    # every epoch draws from all images again
    assert len(set(torch.cat(epochs).tolist())) > 4
    with pytest.raises(ValueError, match=r"steps_per_epoch must be at most 2, the steps of a pass over .* got 3"):
        InMemory(x, y, FitConfig(1, 4, steps_per_epoch=3), x.device)
    with pytest.raises(ValueError, match="4 processes cannot share a last batch of 2 images"):
        InMemory(x, y, FitConfig(1, 4, drop_last=False), x.device, world=4)
    assert RunLength(2, 3, 4, 10).images_before(4) == 14 and RunLength(2, 3, 4, 10).last_batch == 2


def test_a_last_batch_that_carso_cannot_attack_is_refused_before_the_run():
    x, y = (255 * torch.rand(10, 1, 16, 16)).to(torch.uint8), torch.arange(10) % 10
    with pytest.raises(ValueError, match=r"adversarial_fraction 0\.5 of 2 images is too few"):
        fit(carso_task(kl_delay=0.0), x, y, FitConfig(1, 8, drop_last=False), progress=False)


def test_a_delay_in_images_needs_to_know_the_batch():
    x, y = images()
    batches = [(x[:4], y[:4]), (x[4:8], y[4:8])]
    assert "cross_entropy" in fit(atop(cls_delay=0), batches, None, FitConfig(1), progress=False)
    with pytest.raises(ValueError, match="give the delay in steps"):
        fit(atop(cls_delay=4), batches, None, FitConfig(2), progress=False)
    assert isinstance(fit(atop(cls_delay=1, cls_delay_unit="steps"), batches, None, FitConfig(1), progress=False), dict)


def test_the_doubled_range_of_the_released_code_reaches_the_classifier():
    """In the cross-entropy the classifier gets 2x - 1, where it gets x everywhere else."""
    x, y = images()
    for kind, negative in (("unit", False), ("doubled", True)):
        task, least = atop(cls_delay=0, classifier_range=kind), []
        task.defence.classifier.register_forward_pre_hook(lambda _, given, least=least: least.append(given[0].min()))
        fit(task, x, y, FitConfig(1, 4), progress=False)
        assert bool(min(least) < 0) is negative
