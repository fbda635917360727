"""The distillation of a denoiser into a denoiser of one evaluation: its loss by hand, its purpose, its refusals."""

import copy
import dataclasses

import pytest
import torch
from denoisers import trained_unet
from small_models import Made
from torch import nn

from purify_fast import zoo
from purify_fast.methods.diffusion import (
    ConsistencyTask,
    DiffusionConfig,
    DiffusionTask,
    Process,
    Schedule,
)
from purify_fast.methods.diffusion.denoiser import read_denoiser
from purify_fast.ops import Stream, philox
from purify_fast.training import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

INTERVALS = 4


def scaled(weight):
    """A denoiser of one weight that depends on the time."""
    how = lambda self, x, t: self.weight * (1 + t / 1000).view(-1, 1, 1, 1) * x  # noqa: E731
    return Made(how, weight=nn.Parameter(torch.tensor(weight, dtype=torch.float64)))


def batch(n=24, **options):
    x = torch.rand((n, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch(x, torch.arange(n) % 2, torch.arange(n) + 100, **{"seed": 7, **options})


def loss_of(student, average, teacher, given, process=None):
    """The loss of a batch for three denoisers."""
    task = ConsistencyTask(student, DiffusionConfig(intervals=INTERVALS, last_time=0.6), process=process)
    task.teacher, task.average.module = teacher, average
    return task.loss(student, given)


def alpha_and_sigma(schedule, t):
    kept = schedule.alpha_bar(torch.tensor(t, dtype=torch.float64))
    return kept.sqrt(), (1 - kept).sqrt()


def predicted_image(network, kind, state, schedule, t, told):
    """The image by the definition of what is predicted."""
    alpha, sigma = alpha_and_sigma(schedule, t)
    m = network(state[None], torch.tensor([told], dtype=torch.float64))[0]
    return {"noise": (state - sigma * m) / alpha, "x0": m, "v": alpha * state - sigma * m}[kind]


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
@pytest.mark.parametrize("kind", ["linear", "vp"])
def test_the_loss_by_hand(kind, prediction):
    process, given = Process(Schedule(kind), prediction), batch()
    student, average, teacher = scaled(0.5), scaled(0.4), scaled(0.6)
    loss = loss_of(student, average, teacher, given, process)
    use = {"stream": Stream.DIFFUSION_TRAINING}
    seed, schedule = torch.tensor([7]), process.schedule
    z = philox(seed, given.sample_ids, 64, distribution="normal", **use).view(given.x.shape).double()
    chosen = (philox(seed, given.sample_ids, 1, first_draw=1, **use).flatten() * INTERVALS).long().tolist()
    assert set(chosen) == set(range(INTERVALS))
    times = [0.6, 0.45, 0.3, 0.15, 1e-5 if kind == "vp" else 0.0]
    errors = []
    for x, noise, i in zip(2 * given.x - 1, z, chosen, strict=True):
        told = [999 * t if kind == "vp" else 1000 * t - 1 for t in times]
        (alpha, sigma), (alpha_s, sigma_s) = (alpha_and_sigma(schedule, t) for t in times[i : i + 2])
        state = alpha * x + sigma * noise
        guess = predicted_image(teacher, prediction, state, schedule, times[i], told[i]).clamp(-1, 1)
        target = alpha_s * guess + sigma_s * (state - alpha * guess) / sigma
        if i < INTERVALS - 1:
            target = predicted_image(average, prediction, target, schedule, times[i + 1], told[i + 1]).clamp(-1, 1)
        found = predicted_image(student, prediction, state, schedule, times[i], told[i])
        errors.append((found - target).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-10, atol=0)
    loss.backward()
    assert student.weight.grad.abs() > 0 and average.weight.grad is None and teacher.weight.grad is None


def test_the_teacher_stays_and_the_average_leads():
    denoiser = trained_unet(1, 4)
    start = copy.deepcopy(denoiser.state_dict())
    config = DiffusionConfig(intervals=INTERVALS, learning_rate=1e-2, ema_decay=0.5)
    task = ConsistencyTask(denoiser, config)
    given = dataclasses.replace(batch(), x=batch().x.float())
    before = task.validate(given)["loss"]
    for seed in range(4):
        loss, _ = task.training_step(dataclasses.replace(given, seed=seed))
        task.optimizer.zero_grad()
        loss.backward()
        task.optimizer.step()
        task.after_step()
    assert all(torch.equal(value, start[name]) for name, value in task.teacher.state_dict().items())
    assert not any(torch.equal(value, start[name]) for name, value in task.result.named_parameters())
    assert task.result is task.average.module and task.validate(given)["loss"] != before
    # the target is the prediction of the average
    moved = copy.deepcopy(task)
    with torch.no_grad():
        for weight in moved.average.module.parameters():
            weight.mul_(1.5)
    assert moved.training_step(given)[0] != task.training_step(given)[0]


def test_the_table_of_the_intervals_is_made_once(monkeypatch):
    task, made = ConsistencyTask(trained_unet(1, 4), DiffusionConfig(intervals=INTERVALS)), []
    given = dataclasses.replace(batch(), x=batch().x.float())
    denoising = Process.denoising
    monkeypatch.setattr(Process, "denoising", lambda self, times: (made.append(times), denoising(self, times))[1])
    losses = [task.training_step(given)[0] for _ in "123"]
    assert len(made) == 1 and losses[0] == losses[2]


def test_what_cannot_be_distilled():
    with pytest.raises(ValueError, match="intervals must be above 0 for a distillation, got 0"):
        ConsistencyTask(scaled(0.5), DiffusionConfig())
    with pytest.raises(ValueError, match=r"steps must be at most 100, the training step of t_star = 0\.1, got 101"):
        ConsistencyTask(scaled(0.5), DiffusionConfig(intervals=101, last_time=0.1))
    with pytest.raises(ValueError, match="intervals must be 0 for a training on clean images, got 3"):
        DiffusionTask(scaled(0.5), DiffusionConfig(intervals=3))
    with pytest.raises(ValueError, match=r"digits-pgd-at holds a SmallCNN, not a denoiser or a purifier by diffusion"):
        read_denoiser(zoo.folder("digits-pgd-at"))
    distilled = ConsistencyTask(scaled(0.5), DiffusionConfig(intervals=3)).describe()
    assert (distilled["task"], distilled["intervals"]) == ("consistency", 3)
