"""A training of each method that is killed in the middle of an epoch, and goes on, ends with the same weights."""

import pytest
import torch

from purify_fast import data
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.methods.diffusion import ConsistencyTask, DiffusionConfig, DiffusionTask
from purify_fast.models import PreActResNet18, SmallCNN, UNet
from purify_fast.training import Batch, FitConfig, TrainingAttack, fit
from purify_fast.training.checkpoint import read_tree

pytestmark = pytest.mark.usefixtures("one_thread")

ATTACK = TrainingAttack(eps=0.2, steps=2)


def resnet():
    return PreActResNet18(in_channels=1, width=4)


def arrest(model, **options):
    return ArrestTask(model, ArrestConfig(attack=ATTACK, **options), (1, 16, 16))


def atop(**options):
    defence = Atop(SmallCNN(width=4), SmallGenerator(1, width=2), (1, 16, 16), block=4, sigma=0.1)
    return AtopTask(defence, AtopConfig(cls_delay=1, learning_rate=1e-3, **options))


def carso(**options):
    defence = Carso(SmallCNN(width=4), ["conv2", "hidden"], (1, 16, 16), 8, 4, 2, decoder_width=2)
    return CarsoTask(defence, CarsoConfig(attack=ATTACK, kl_delay=0.0, **options))


def diffusion(**options):
    return DiffusionTask(UNet(1, 4), DiffusionConfig(**options))


FINETUNED = {"optimizer": "adamw", "schedule": "one_cycle", "learning_rate": 1e-2, "ema_decay": 0.5}
TASKS = {
    "arrest": lambda: arrest(resnet()),
    "arrest, average and perturbed weights": lambda: arrest(resnet(), ema_decay=0.9, awp_gamma=0.01),
    "arrest, bfloat16": lambda: arrest(resnet(), precision="bfloat16", drift_mode="train"),
    "arrest, AdamW": lambda: arrest(SmallCNN(width=4), **FINETUNED),
    "atop": atop,
    "atop, discriminator": lambda: atop(gan_grad=True, discriminator_width=2),
    "carso": lambda: carso(optimizer="radam_lookahead", lookahead_steps=2),
    "diffusion": diffusion,
    "diffusion, bfloat16 and no average": lambda: diffusion(precision="bfloat16", ema_decay=0.0, noise_schedule="vp"),
    "diffusion, distilled": lambda: ConsistencyTask(UNet(1, 4), DiffusionConfig(intervals=4, ema_decay=0.5)),
    "carso, joint": lambda: carso(attack_target="pipeline", joint=True),
}


class Killed(Exception):
    pass


def trained(name, folder, kill_at=None):
    """The checkpoint and the result of six steps; with ``kill_at`` that step is not taken."""
    torch.manual_seed(0)
    task, digits, steps = TASKS[name](), data.load_dataset("digits"), []
    updates = task.updates

    def counted(batch):
        steps.append(batch)
        if len(steps) == kill_at:
            raise Killed
        return updates(batch)

    task.updates = counted
    fit(task, digits.x_train[:48], digits.y_train[:48], FitConfig(2, 16, 3, checkpoint_seconds=0), folder)
    return read_tree(folder / "checkpoint.safetensors"), task.result.state_dict()


@pytest.mark.parametrize("name", TASKS)
def test_killed_and_resumed_training_is_the_same(name, tmp_path):
    one, whole = trained(name, tmp_path / "whole")
    with pytest.raises(Killed):
        trained(name, tmp_path / "cut", kill_at=5)
    two, resumed = trained(name, tmp_path / "cut")
    assert one["step"] == two["step"] == 6 and one["last"] == two["last"]
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_an_interrupted_step_leaves_no_perturbation(tmp_path):
    """A step computes the loss twice. It was interrupted between the perturbation and the optimizer's step."""
    digits, results = data.load_dataset("digits"), []
    run = digits.x_train[:32], digits.y_train[:32], FitConfig(2, 16, checkpoint_seconds=0)
    for stop_at in (None, 6):
        torch.manual_seed(0)
        made, calls = arrest(SmallCNN(width=4), awp_gamma=0.05), []
        loss = made.loss

        def counted(*given, calls=calls, loss=loss, stop_at=stop_at):
            calls.append(given)
            if len(calls) == stop_at:
                raise Killed
            return loss(*given)

        made.loss = counted
        if stop_at is not None:
            with pytest.raises(Killed):
                fit(made, *run, tmp_path / "cut")
        # as in a notebook, with the same task
        fit(made, *run, tmp_path / ("whole" if stop_at is None else "cut"))
        results.append(made.result.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_a_delay_of_nothing_needs_no_batch_size():
    digits = data.load_dataset("digits")
    made = AtopTask(atop().defence, AtopConfig(cls_delay=0))
    fit(made, [(digits.x_train[:16], digits.y_train[:16])] * 2, None, FitConfig(1))
    assert made.result.acts_from_step["cross_entropy"] == 0


def test_held_out_images_get_the_same_noise_from_any_number_of_processes(monkeypatch):
    made, digits = carso(attack_target="pipeline"), data.load_dataset("digits")
    batch = Batch(digits.x_test[:8].float() / 255, digits.y_test[:8], torch.arange(8), seed=1, whole=True)
    torch.manual_seed(1)
    alone = made.validate(batch)
    torch.manual_seed(1)
    monkeypatch.setattr("purify_fast.methods.purifier_task.processes", lambda: (0, 2))
    assert made.validate(batch) == alone
