"""The block without gradients of weights, and what it leaves as it was."""

import pytest
import torch
from torch import nn

from purify_fast.attacks.attacked_model import frozen
from purify_fast.speed.frozen_copy import images_only


def test_weights_that_the_user_froze_stay_frozen_and_the_others_learn_again():
    one, other = nn.Linear(3, 2), nn.Linear(2, 2)
    one.bias.requires_grad_(False)
    with pytest.raises(KeyError), images_only(one, other):
        assert not any(weight.requires_grad for model in (one, other) for weight in model.parameters())
        raise KeyError
    assert [weight.requires_grad for weight in (*one.parameters(), *other.parameters())] == [True, False, True, True]


def test_weights_made_in_inference_mode_stay_as_they_are():
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    with images_only(model):
        pass
    assert all(weight.requires_grad for weight in model.parameters())


def test_of_two_blocks_that_overlap_the_last_to_end_restores():
    model, blocks = nn.Linear(3, 2).train(), []
    for _ in range(2):
        blocks += [frozen(model), images_only(model)]
    for block in blocks:
        block.__enter__()
    for block in blocks:
        assert not model.training or block is blocks[-1]
        assert not model.weight.requires_grad
        block.__exit__(None, None, None)
    assert model.training and model.weight.requires_grad
