"""The modules of purify_fast.nn compute what PyTorch's functions and their ops compute."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import purify_fast
from purify_fast import ops

X, SEED = torch.rand(3, 3, 8, 8), torch.tensor([1])
MU, LOGVAR, LOGITS, OUTPUT = torch.randn(3, 2, 5), torch.randn(3, 2, 5), torch.randn(3, 10, 4), torch.randn(3, 3, 8, 8)
STUDENT, TEACHER, FEATURES = *torch.randn(2, 4, 6, 5, dtype=torch.float64), torch.randn(2, 4, 8, 8)
HIDDEN = F.pad(torch.ones(2, 1, 8, 8), (0, 56, 0, 56))
MODULES, DISTANCE = purify_fast.nn, 1 - F.cosine_similarity(STUDENT.flatten(1), TEACHER.flatten(1))
LOSS = F.binary_cross_entropy_with_logits(OUTPUT, X, reduction="none").sum((1, 2, 3))
ATTENDED = ops.contextual_attention(FEATURES, ops.key_validity(HIDDEN, (4, 4)))
#: A module, what it is given, and the result.
CASES = [
    (MODULES.CosineDistance(), (STUDENT, TEACHER), DISTANCE),
    (MODULES.CosineDistance(), ([STUDENT] * 2, [TEACHER] * 2), torch.stack([DISTANCE] * 2, 1)),
    (lambda *given: MODULES.SampleLatent()(*given, seed=SEED), (MU, LOGVAR), ops.sample_latent(MU, LOGVAR, SEED)),
    (MODULES.ReconstructionLoss(), (OUTPUT, X), LOSS),
    (MODULES.Aggregate(), (LOGITS,), LOGITS.logsumexp(1)),
    (MODULES.GatedELU(), (X[:, :2],), F.elu(X[:, :1]) * X[:, 1:2].sigmoid()),
    (MODULES.ContextualAttention(), (FEATURES, HIDDEN), ATTENDED),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_a_module_computes(number):
    module, given, wanted = CASES[number]
    torch.testing.assert_close(module(*given), wanted)


def test_a_teacher_with_a_gradient_is_refused():
    with pytest.raises(ValueError, match=r"teacher must not require a gradient.*teacher.detach"):
        MODULES.CosineDistance()(STUDENT, TEACHER.clone().requires_grad_())


def test_a_random_mask_hides_and_stitch_puts_together():
    packed, owners = purify_fast.nn.RandomMask(block=2, ratio=0.5)(X)
    assert (owners.sum((0, 2, 3)) == 8).all() and (packed[:, :3][packed[:, 4:].expand(-1, 3, -1, -1) == 1] == 0).all()
    passes, owners = purify_fast.nn.RandomMask(block=2)(X, num_passes=4)
    assert purify_fast.nn.Stitch()(passes, owners).shape == (3, 5, 8, 8)


def test_a_moving_average_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    average, weight = purify_fast.nn.EMA(model, decay=0.9), model[0].weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(3, 4))
        average.update(model)
        weight = 0.9 * weight + 0.1 * model[0].weight.detach()
    by_hand = copy.deepcopy(model)
    by_hand[0].weight = nn.Parameter(weight)
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(average.eval()(x), by_hand.eval()(x))
    assert not any(p.requires_grad for p in average.parameters())
