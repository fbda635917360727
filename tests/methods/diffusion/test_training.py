"""A denoiser's training: its loss by hand, its times, precision, the moving average, and what it refuses."""

import dataclasses

import pytest
import torch
from torch import nn

from purify_fast.methods.diffusion import DiffusionConfig, DiffusionTask, Process, Schedule
from purify_fast.methods.diffusion.task import denoising_loss, training_times
from purify_fast.models import UNet
from purify_fast.ops import Stream, philox
from purify_fast.training import Batch, FitConfig, fit


class Recording(nn.Module):
    """A denoiser of one weight that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        self.x, self.t = x, t
        return self.weight * x


def batch(n=6, channels=1, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((n, channels, 8, 8), generator=generator)
    return Batch(x, torch.arange(n) % 2, torch.arange(n) + 100, **{"seed": 7, **options})


def unet(**options):
    torch.manual_seed(0)
    return UNet(**{"channels": 1, "width": 4, **options})


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
@pytest.mark.parametrize("kind", ["linear", "cosine", "vp"])
def test_the_loss_by_hand(kind, prediction):
    model, given = Recording(), batch()
    loss = denoising_loss(model, given, Process(Schedule(kind), prediction), DiffusionConfig(last_time=0.6))
    use = {"stream": Stream.DIFFUSION_TRAINING}
    seed = torch.tensor([7])
    z = philox(seed, given.sample_ids, 64, distribution="normal", **use).view(6, 1, 8, 8)
    u = philox(seed, given.sample_ids, 1, first_draw=1, **use).flatten()
    if kind == "vp":
        t = 1e-5 + (0.6 - 1e-5) * u.double()
        told = 999 * t
    else:
        index = (600 * u).floor()
        t, told = (index + 1) / 1000, index
    kept = Schedule(kind).alpha_bar(t)[:, None, None, None].float()
    clean, alpha, sigma = 2 * given.x - 1, kept.sqrt(), (1 - kept).sqrt()
    torch.testing.assert_close(model.x, alpha * clean + sigma * z)
    torch.testing.assert_close(model.t, told.float())
    target = {"noise": z, "x0": clean, "v": alpha * z - sigma * clean}[prediction]
    torch.testing.assert_close(loss, (0.5 * model.x - target).square().mean())


def test_times_are_spread_over_all_steps_up_to_the_last():
    u = (torch.arange(4000) + 0.5) / 4000
    for kind, last, first, steps in (("linear", 1.0, 0.001, 1000), ("cosine", 0.25, 0.001, 250)):
        counted = torch.unique(training_times(Schedule(kind), u, last), return_counts=True)
        assert len(counted[0]) == steps and counted[1].eq(4000 // steps).all()
        assert counted[0][0].item() == pytest.approx(first) and counted[0][-1].item() == pytest.approx(last)
    t = training_times(Schedule("vp"), u, 0.5)
    assert 1e-5 < t[0] < 2e-4 and 0.499 < t[-1] < 0.5 and t.diff().min() > 0


def test_a_split_batch_has_the_losses_of_the_whole():
    model, config, whole = unet(), DiffusionConfig(), batch()
    halves = [
        dataclasses.replace(whole, x=whole.x[rows], y=whole.y[rows], sample_ids=whole.sample_ids[rows])
        for rows in (slice(0, 3), slice(3, 6))
    ]
    parts = [denoising_loss(model, half, Process(), config) for half in halves]
    torch.testing.assert_close(torch.stack(parts).mean(), denoising_loss(model, whole, Process(), config))
    assert not torch.equal(*parts)
    assert denoising_loss(model, batch(seed=8), Process(), config) != denoising_loss(model, whole, Process(), config)


def test_the_moving_average_begins_fast():
    task = DiffusionTask(unet(), DiffusionConfig(ema_decay=0.7))
    average = {name: value.clone() for name, value in task.denoiser.state_dict().items()}
    # what a step keeps after n others, until that is above the decay
    for kept in [(1 + n) / (10 + n) for n in range(22)]:
        for weight in task.denoiser.parameters():
            weight.data.add_(torch.randn_like(weight))
        task.after_step()
        for name, now in task.denoiser.state_dict().items():
            average[name] = min(kept, 0.7) * average[name] + (1 - min(kept, 0.7)) * now
    for name, value in task.result.state_dict().items():
        torch.testing.assert_close(value, average[name])
    assert DiffusionTask(task.denoiser, DiffusionConfig(ema_decay=0.0)).result is task.denoiser


def test_what_cannot_be_trained(tmp_path):
    task, loop = DiffusionTask(unet(), DiffusionConfig()), FitConfig(1, 2)
    colored = torch.zeros((4, 3, 8, 8), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"x must be \[B, 1,"):
        fit(task, colored, torch.zeros(4, dtype=torch.int64), loop, progress=False)
    smaller = DiffusionTask(nn.Sequential(Recording(), nn.AvgPool2d(2)), DiffusionConfig())
    smaller.denoiser.forward = lambda x, t: nn.functional.avg_pool2d(x, 2)
    with pytest.raises(ValueError, match=r"the denoiser must return images .*, got \[1, 3, 4, 4\]"):
        fit(smaller, colored, torch.zeros(4, dtype=torch.int64), loop, progress=False)
    gray = colored[:, :1]
    fit(task, gray, torch.zeros(4, dtype=torch.int64), loop, tmp_path, progress=False)
    other = DiffusionTask(unet(), DiffusionConfig(prediction="v"))
    with pytest.raises(ValueError, match="prediction: 'noise', now 'v'"):
        fit(other, gray, torch.zeros(4, dtype=torch.int64), loop, tmp_path, progress=False)
