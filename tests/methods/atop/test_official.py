"""DeepFillv2 checkpoints: read under the official names, and what happens with files that do not fit."""

import pytest
import torch
from small_runs import same

from purify_fast.methods.atop import DeepFillGenerator
from purify_fast.methods.atop.generators import CONSTANT, FIRST


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(1)
    made = DeepFillGenerator(width=8)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return made


def test_a_round_trip_keeps_every_tensor_under_its_official_name(generator, tmp_path):
    path = tmp_path / "states.pth"
    torch.save({"G": generator.state_dict()}, path)
    loaded = DeepFillGenerator.from_official(str(path))
    assert same(loaded, generator) and loaded.arguments == generator.arguments and not loaded.training


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state,  # the state dict alone
        lambda state: {"G": state, "D": {"weight": torch.ones(2)}, "G_optim": {"state": {0: {"step": 1}}}, "n_iter": 7},
        lambda state: {"G": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"G": {name: tensor for name, tensor in state.items() if name != CONSTANT}},
    ],
)
def test_ways_to_hold_it(generator, tmp_path, change):
    torch.save(change(generator.state_dict()), tmp_path / "states.pth")
    assert same(DeepFillGenerator.from_official(tmp_path / "states.pth"), generator)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("stage1.conv_bn3.conv.bias"), r"is not .*: stage1\.conv_bn3\.conv\.bias is missing$"),
        (lambda s: s.update({"stage2.conv_bn7.conv.bias": torch.zeros(3)}), r"bias is \[3\], must be \[32\]$"),
        (lambda s: s.update(extra=3), "has no state dict"),
        (lambda s: s.pop(FIRST), "must hold a generator of deepfillv2-pytorch, got the tensors stage1"),
    ],
)
def test_states_that_do_not_fit_are_named_with_their_tensors(generator, tmp_path, change, message):
    state = dict(generator.state_dict())
    change(state)
    torch.save({"G": state}, tmp_path / "states.pth")
    with pytest.raises(ValueError, match=message):
        DeepFillGenerator.from_official(tmp_path / "states.pth")
