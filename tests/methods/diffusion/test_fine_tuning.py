"""Fine-tuning a denoiser through its whole purification, and saved denoisers that are put before a classifier."""

import dataclasses
import json

import pytest
import torch
from denoisers import trained_unet

import purify_fast
from purify_fast import data, zoo
from purify_fast.methods.diffusion import (
    DiffusionConfig,
    DiffusionPurifier,
    DiffusionTask,
    Process,
    PurificationTask,
    Schedule,
    save_denoiser,
)
from purify_fast.methods.diffusion.task import denoising_loss, purification_loss
from purify_fast.models import SmallCNN, UNet
from purify_fast.training import Batch, FitConfig, TrainingAttack, fit
from purify_fast.training.checkpoint import read_tree

pytestmark = pytest.mark.usefixtures("one_thread")

ATTACK = TrainingAttack(eps=0.1, steps=2)


def classifier():
    torch.manual_seed(1)
    return SmallCNN(image_size=(8, 8), num_classes=2, width=4)


def purifier(**options):
    return DiffusionPurifier(trained_unet(1, 4), classifier(), (1, 8, 8), Process(t_star=0.2, steps=3), **options)


def batch(n=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((n, 1, 8, 8), generator=generator)
    return Batch(x, torch.arange(n) % 2, torch.arange(n) + 100, seed=7)


def images(n=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return x, (x.float().mean((1, 2, 3)) > 127.5).long()


def plain_loop(step, x, n, inputs=(), **_):
    for i in range(n):
        x = step(x, i, *inputs)
    return x


def test_the_gradient_is_that_of_a_plain_loop(monkeypatch):
    defence = purifier(samples=2).double()
    defence.denoiser.requires_grad_(True)
    given, config = dataclasses.replace(batch(), x=batch().x.double()), DiffusionConfig(attack=ATTACK)
    found = []
    for loop in (None, plain_loop):
        if loop is not None:
            monkeypatch.setattr(purify_fast.methods.diffusion.defence, "checkpointed_steps", loop)
        with defence.fixed_noise(3):
            loss, metrics = purification_loss(defence, given, dataclasses.replace(config, denoising_weight=0.0))
        found.append(torch.autograd.grad(loss, list(defence.denoiser.parameters())))
        assert set(metrics) == {"cross_entropy", "accuracy"}
    for ours, theirs in zip(*found, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-18)
    # with its weight, the loss of clean images is added
    with defence.fixed_noise(3):
        both, metrics = purification_loss(defence, given, dataclasses.replace(config, denoising_weight=0.5))
    clean = denoising_loss(defence.denoiser, given, defence.process, config)
    torch.testing.assert_close(both, loss + 0.5 * clean)
    torch.testing.assert_close(metrics["denoising"], clean)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fine_tuning_lowers_the_cross_entropy(precision, tmp_path):
    standard, digits = zoo.load("digits-standard"), data.load_dataset("digits")
    torch.manual_seed(0)
    # one step to an image, which a fresh network predicts to be grey
    process = Process(prediction="x0", solver="one_shot", t_star=0.2)
    defence = DiffusionPurifier(UNet(1, 8), standard, (1, 16, 16), process)
    start = {name: value.clone() for name, value in defence.state_dict().items()}
    config = DiffusionConfig(attack=ATTACK, learning_rate=1e-2, precision=precision, ema_decay=0.5)
    task = PurificationTask(defence, config)
    fit(task, digits.x_train[:128], digits.y_train[:128], FitConfig(8, 32), tmp_path, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["cross_entropy"] < 0.85 * rows[0]["cross_entropy"]
    now = defence.state_dict()
    assert all(torch.equal(now[name], value) for name, value in start.items() if name.startswith("classifier"))
    average = task.average.module.state_dict()
    assert all(torch.equal(defence.denoiser.state_dict()[name], value) for name, value in average.items())
    # what was trained comes back
    defence.accelerate(None).save(tmp_path)
    again, x = purify_fast.load_defence(tmp_path, standard), digits.x_test[:8] / 255
    with defence.fixed_noise(1), again.fixed_noise(1):
        torch.testing.assert_close(again(x), defence(x))


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_and_resumed_fine_tuning_is_the_same(tmp_path):
    def trained(folder, kill_at=None):
        task, steps = PurificationTask(purifier(), DiffusionConfig(attack=ATTACK)), []
        step = task.training_step

        def counted(given):
            steps.append(given)
            if len(steps) == kill_at:
                raise Killed
            return step(given)

        task.training_step = counted
        fit(task, *images(), FitConfig(2, 16, checkpoint_seconds=0), folder, progress=False)
        return read_tree(folder / "checkpoint.safetensors")["model"], task.result.state_dict()

    one, whole = trained(tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tmp_path / "cut", kill_at=3)
    two, resumed = trained(tmp_path / "cut")
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("kind", ["linear", "vp"])
def test_a_saved_denoiser_is_put_before_a_classifier(kind, tmp_path):
    network = trained_unet(1, 4)
    process = {"schedule": kind, "prediction": "v"}
    save_denoiser(network, tmp_path, (1, 8, 8), process, last_time=0.5)
    defence = purify_fast.load_defence(tmp_path, classifier(), process={"t_star": 0.3, "steps": 4})
    assert isinstance(defence, DiffusionPurifier) and not defence.training
    assert defence.process == Process(Schedule(kind), "v", t_star=0.3, steps=4)
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in defence.denoiser.module.state_dict().items())
    # saved with its classifier, it keeps what was chosen, until another process is asked for
    defence.save(tmp_path / "whole")
    for folder in (tmp_path, tmp_path / "whole"):
        with pytest.raises(ValueError, match=r"t_star must be at most 0\.5, the last time that the .*, got 0\.6"):
            purify_fast.load_defence(folder, classifier(), process={"t_star": 0.6})
    assert purify_fast.load_defence(tmp_path / "whole", classifier()).process == defence.process
    again = purify_fast.load_defence(tmp_path / "whole", classifier(), process={"solver": "one_shot", "steps": None})
    assert (again.process.solver, again.process.t_star, again.process.steps) == ("one_shot", 0.3, None)


def test_what_cannot_be_fine_tuned(tmp_path):
    with pytest.raises(ValueError, match=r"eps must be above 0 to train through the purification, got 0\.0"):
        PurificationTask(purifier(), DiffusionConfig())
    x, y = images(16)
    fit(
        DiffusionTask(trained_unet(1, 4), DiffusionConfig()),
        x,
        y,
        FitConfig(1, 16),
        tmp_path,
        progress=False,
    )
    with pytest.raises(ValueError, match=r"training 'diffusion', .* 'diffusion through the purification'"):
        task = PurificationTask(purifier(), DiffusionConfig(attack=ATTACK))
        fit(task, x, y, FitConfig(1, 16), tmp_path, progress=False)
