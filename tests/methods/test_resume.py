"""A training of each method that is killed in the middle of an epoch, and goes on, ends with the same weights."""

from functools import partial

import pytest
import torch
from small_models import first_digits
from small_runs import StopAt, Stopped, arrest_task, atop_task, carso_task

from purify_fast import data
from purify_fast.models import PreActResNet18
from purify_fast.training import Batch, FitConfig, fit
from purify_fast.training.run import read_tree

arrest = partial(arrest_task, network=partial(PreActResNet18, in_channels=1))
atop = partial(atop_task, cls_delay=1, learning_rate=1e-3)
carso = partial(carso_task, kl_delay=0.0)
FINETUNED = {"optimizer": "adamw", "schedule": "one_cycle", "learning_rate": 1e-2, "ema_decay": 0.5}
TASKS = {
    "arrest": arrest,
    "arrest, average": partial(arrest, ema_decay=0.9),
    "arrest, bfloat16": partial(arrest, precision="bfloat16", drift_mode="train"),
    "arrest, AdamW": partial(arrest_task, **FINETUNED),
    "atop": atop,
    "atop, discriminator": partial(atop, gan_grad=True, discriminator_width=2),
    "carso": partial(carso, optimizer="radam_lookahead", lookahead_steps=2),
    "carso, pipeline": partial(carso, "pipeline"),
}


def trained(name, folder, *callbacks):
    """The checkpoint and the result of six steps."""
    torch.manual_seed(0)
    task, config = TASKS[name](), FitConfig(2, 8, 3, checkpoint_seconds=0)
    fit(task, *first_digits(24), config, folder, callbacks=callbacks)
    return read_tree(folder / "checkpoint.safetensors"), task.result.state_dict()


#: Their parts are those of other trainings here.
SLOW = ("arrest, average", "arrest, AdamW", "atop, discriminator")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TASKS])
def test_killed_and_resumed_training_is_the_same(name, tmp_path):
    one, whole = trained(name, tmp_path / "whole")
    with pytest.raises(Stopped):
        trained(name, tmp_path / "cut", StopAt(5))
    two, resumed = trained(name, tmp_path / "cut")
    assert one["step"] == two["step"] == 6 and one["last"] == two["last"]
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_held_out_images_get_the_same_noise_from_any_number_of_processes(monkeypatch):
    made, digits = carso("pipeline"), data.load_dataset("digits")
    batch = Batch(digits.x_test[:8].float() / 255, digits.y_test[:8], torch.arange(8), seed=1, whole=True)
    torch.manual_seed(1)
    alone = made.validate(batch)
    torch.manual_seed(1)
    monkeypatch.setattr("purify_fast.methods.purifier_task.processes", lambda: (0, 2))
    assert made.validate(batch) == alone
