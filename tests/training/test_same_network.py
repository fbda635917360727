"""A run is of its network: its code and its structure, and not only the shapes of its weights."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from small_runs import StopAt, Stopped, arrest_task, atop_task, carso_task, images
from torch import nn

from purify_fast import data
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self, activation=None, dropout=0.1, stride=1, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.scale = scale
        self.layers = nn.Sequential(
            nn.Conv2d(1, 2, 3, stride, 1), activation or nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.drop, self.last = nn.Dropout(dropout), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.drop(self.layers(self.scale * x - 0.5)))


class Edited(Net):
    def forward(self, x):
        return self.last(self.drop(self.layers((x - 0.4) / 0.2)))


Edited.__name__ = Edited.__qualname__ = "Net"


class Other(ClassifierTask):
    def training_step(self, batch):
        loss, metrics = super().training_step(batch)
        return 2 * loss, metrics


def told(folder, make, caplog, task=ClassifierTask):
    """Continue a run with another network; return True if a warning says that the network has changed."""
    config = FitConfig(2, 16, checkpoint_seconds=0)
    with pytest.raises(Stopped):
        fit(ClassifierTask(Net(), ClassifierConfig()), *images(), config, folder, progress=False, callbacks=[StopAt(2)])
    caplog.clear()
    made = make()
    fit(task(made, ClassifierConfig()), *images(), config, folder, progress=False)
    said = "the code or the structure of the network" in caplog.text
    # A finished run is not written again by another network.
    with pytest.raises(ValueError, match="the run is finished, and the code or") if said else nullcontext():
        fit(task(make(), ClassifierConfig()), *images(), config, folder, progress=False)
    return said


EDITS = {
    "activation": lambda: Net(nn.SiLU()),
    "dropout": lambda: Net(dropout=0.5),
    "stride": lambda: Net(stride=2),
    "attribute": lambda: Net(scale=2.0),
    "code": Edited,
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_run_that_another_network_continues_is_told_so(edit, tmp_path, caplog):
    assert told(tmp_path, EDITS[edit], caplog)


def test_the_same_network_and_its_mode_are_not_told(tmp_path, caplog):
    assert not told(tmp_path, Net, caplog)
    assert not told(tmp_path / "eval", lambda: Net().eval(), caplog)
    assert told(tmp_path / "loss", Net, caplog, Other)


@pytest.mark.parametrize("make", [partial(carso_task, kl_delay=0.0), atop_task, arrest_task])
def test_the_methods_continue_without_a_word(make, tmp_path, caplog):
    digits = data.load_dataset("digits")
    x, y, config = digits.x_train[:32], digits.y_train[:32], FitConfig(2, 16, checkpoint_seconds=0)
    with pytest.raises(Stopped):
        fit(make(), x, y, config, tmp_path, progress=False, callbacks=[StopAt(2)])
    finished = make()
    for task in (make(), finished, finished):
        fit(task, x, y, config, tmp_path, progress=False)
    assert "network" not in caplog.text
