"""Checkpoints and saved models give back the values of get_extra_state."""

import pytest
import torch
from small_runs import StopAt, Stopped, images
from torch import nn

from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit
from purify_fast.training.run import read_model, save_model


class Extra(nn.Linear):
    value = None

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


def extra(value):
    made = nn.Sequential(nn.Flatten(), Extra(64, 2))
    made[1].value = value
    return made


def run(made, folder, **options):
    torch.manual_seed(0)
    task = ClassifierTask(made, ClassifierConfig())
    config = FitConfig(3, 16, checkpoint_seconds=0, validation_share=0.25, keep_best="loss")
    fit(task, *images(), config, folder, progress=False, **options)
    return task


@pytest.mark.parametrize("value", [{"version": 3, "names": [1, None, "x"]}, torch.arange(3.0)], ids=["JSON", "tensor"])
def test_a_run_continues_with_the_extra_state_of_a_model(value, tmp_path):
    torch.manual_seed(1)
    whole = run(extra(value), tmp_path / "whole")
    torch.manual_seed(1)
    with pytest.raises(Stopped):
        run(extra(value), tmp_path / "cut", callbacks=[StopAt(5)])
    resumed = extra(torch.zeros(3) if isinstance(value, torch.Tensor) else None)
    run(resumed, tmp_path / "cut")
    assert all(map(torch.equal, whole.model.parameters(), resumed.parameters()))
    assert str(resumed[1].value) == str(value)


def test_a_saved_model_has_the_extra_state(tmp_path):
    state = {"weight": torch.ones(2), "1._extra_state": {"version": 5}}
    save_model(tmp_path, "Kind", {}, state)
    facts, back = read_model(tmp_path)
    assert torch.equal(back.pop("weight"), state.pop("weight"))
    assert back == state and facts.keys() == {"kind", "arguments", "version"}
