"""Parts of a model that the user froze stay as they are."""

import pytest
import torch
from small_runs import images
from torch import nn

from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit


def model(affine=True):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, affine=affine), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(backbone, nn.Flatten(), nn.Linear(108, 2))


def statistics(made):
    return {name: value.clone() for name, value in made.state_dict().items() if "running" in name or "0.0" in name}


def trained(made, task=None, **options):
    """The modes in the steps of a training with a validation, and whether the backbone's tensors stayed."""
    task, before, modes = task or ClassifierTask(made, ClassifierConfig()), statistics(made), []
    step = task.training_step
    task.training_step = lambda batch: modes.append([part.training for part in made[0]]) or step(batch)
    config = FitConfig(2, 16, validation_share=0.25, **options)
    fit(task, *images(), config, progress=False)
    assert len(made[0]) == len(modes[0]) and all(one == modes[0] for one in modes)
    return modes[0], all(torch.equal(value, before[name]) for name, value in statistics(made).items())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_backbone_that_was_frozen_in_evaluation_mode_is_not_changed(affine, whole):
    """Also if the model as a whole is in evaluation mode, as after loading, and also by a method's training."""
    for method in ("classifier", "arrest"):
        made = model(affine)
        (made if whole else made[0]).eval()
        made[0].requires_grad_(False)
        task = ArrestTask(made, ArrestConfig(), (1, 8, 8), ["0"]) if method == "arrest" else None
        modes, same = trained(made, task)
        assert modes[1:] == [False] * 3 and same


def test_a_part_without_weights_stays_frozen_in_a_part_that_trains():
    made = model(affine=False)
    made[0][1].eval()
    made[0][3].eval()
    modes, _ = trained(made)
    assert modes == [True, False, True, False]


def test_a_loaded_model_is_trained():
    assert trained(model().eval()) == ([True] * 4, False)


def test_weights_frozen_in_training_mode_keep_that_mode():
    made = model()
    made[0].requires_grad_(False)
    modes, same = trained(made)
    assert modes == [True] * 4 and not same
