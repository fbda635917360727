"""The example that trains a denoiser: its loss by hand, its moving average, and a defence from its result."""

import pytest
import torch
from torch import nn

from examples import your_diffusion_loop as example
from purify_fast import load_defence, zoo
from purify_fast.methods.diffusion import Schedule
from purify_fast.models import UNet
from purify_fast.ops import Stream, philox
from purify_fast.training import Batch


class Recording(nn.Module):
    """A denoiser of one weight that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        self.x, self.t = x, t
        return self.weight * x


def test_the_loss_is_that_of_the_schedule_of_the_purifier():
    task, n = example.Denoising(Recording()), 6
    x, ids = torch.rand((n, 1, 8, 8), generator=torch.Generator().manual_seed(0)), torch.arange(n) + 100
    loss, _ = task.training_step(Batch(x, torch.zeros(n, dtype=torch.int64), ids, seed=7))
    use = {"seed": torch.tensor([7]), "sample_ids": ids, "stream": Stream.DIFFUSION_TRAINING}
    z = philox(**use, numel=64, distribution="normal").view(n, 1, 8, 8)
    index = (400 * philox(**use, numel=1, first_draw=1).flatten()).floor()
    kept = Schedule().alpha_bar((index + 1) / 1000)[:, None, None, None].float()
    given = task.denoiser
    torch.testing.assert_close(given.x, kept.sqrt() * (2 * x - 1) + (1 - kept).sqrt() * z)
    assert torch.equal(given.t, index.long())
    torch.testing.assert_close(loss, (0.5 * given.x - z).square().mean())


def test_the_result_is_a_moving_average_that_begins_fast():
    task = example.Denoising(nn.Linear(2, 2))
    average = {name: value.clone() for name, value in task.denoiser.state_dict().items()}
    # the share of the old average that stays after n steps
    for kept in [(1 + n) / (10 + n) for n in range(5)]:
        for weight in task.denoiser.parameters():
            weight.data.add_(torch.randn_like(weight))
        task.after_step()
        for name, now in task.denoiser.state_dict().items():
            average[name] = kept * average[name] + (1 - kept) * now
    for name, value in task.result.state_dict().items():
        torch.testing.assert_close(value, average[name])


def test_the_package_purifies_with_its_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "WIDTH", 4)
    example.main(["--train", str(tmp_path), "--epochs", "1"])
    assert f"purify-fast evaluate {tmp_path} --classifier" in capsys.readouterr().out
    defence = load_defence(tmp_path, zoo.load("digits-pgd-at"), process={"steps": 2})
    fresh = UNet(1, 4, patch=2).state_dict()
    assert any(not torch.equal(value, fresh[name]) for name, value in defence.denoiser.module.state_dict().items())
    assert defence(torch.rand(2, 1, 16, 16)).shape == (2, 10)
    with pytest.raises(ValueError, match="t_star must be at most"):
        load_defence(tmp_path, zoo.load("digits-pgd-at"), process={"t_star": 0.5, "steps": 2})
