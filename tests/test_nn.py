"""The modules of purify_fast.nn compute what their ops compute, and fit PyTorch's own forms."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import purify_fast
from purify_fast import ops

X = torch.rand(3, 3, 8, 8)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5, 5)])
def test_the_cosine_distance_is_that_of_pytorch(shape):
    student = torch.randn(shape, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(shape, dtype=torch.float64)
    got = purify_fast.nn.CosineDistance()(student, teacher)
    wanted = 1 - F.cosine_similarity(student.flatten(1), teacher.flatten(1))
    torch.testing.assert_close(got, wanted)
    slopes = [torch.autograd.grad(value.sum(), student, retain_graph=True)[0] for value in (got, wanted)]
    torch.testing.assert_close(*slopes)
    with pytest.raises(ValueError, match=r"teacher must not require a gradient.*teacher.detach"):
        purify_fast.nn.CosineDistance()(student, teacher.clone().requires_grad_())
    layers = purify_fast.nn.CosineDistance("abs_cosine")([student, student[:, :2]], [teacher, teacher[:, :2]])
    assert layers.shape == (4, 2)


def test_the_parts_of_an_autoencoder():
    mu, logvar, seed = torch.randn(3, 2, 5), torch.randn(3, 2, 5), torch.tensor([1])
    z, kl = purify_fast.nn.SampleLatent()(mu, logvar, seed=seed)
    assert torch.equal(z, ops.sample_latent(mu, logvar, seed)[0]) and kl.shape == (3, 2)
    many = torch.rand(3, 4, 3, 8, 8)
    loss = purify_fast.nn.ReconstructionLoss("mse", reduction="mean")(many, X)
    torch.testing.assert_close(loss, (many - X[:, None]).square().sum((2, 3, 4)).mean())
    bce = purify_fast.nn.ReconstructionLoss(from_logits=False, reduction="sum")(X, X)
    torch.testing.assert_close(bce, F.binary_cross_entropy(X, X, reduction="sum"))


def test_aggregate_and_gated_elu():
    logits = torch.randn(3, 10, 4)
    torch.testing.assert_close(purify_fast.nn.Aggregate(dim=-1)(logits), logits.logsumexp(-1))
    a, b = X[:, :1], X[:, 1:2]
    torch.testing.assert_close(purify_fast.nn.GatedELU()(X[:, :2]), F.elu(a) * torch.sigmoid(b))


def test_contextual_attention_finds_its_keys_from_a_mask():
    features, mask = torch.randn(2, 4, 8, 8), torch.zeros(2, 1, 64, 64)
    mask[:, :, :8, :8] = 1
    wanted = ops.contextual_attention(features, ops.key_validity(mask, (4, 4)))
    assert torch.equal(purify_fast.nn.ContextualAttention()(features, mask), wanted)


def test_a_random_mask_hides_and_stitch_puts_together():
    packed, owners = purify_fast.nn.RandomMask(block=2, ratio=0.5)(X)
    assert (owners.sum((0, 2, 3)) == 8).all() and (packed[:, :3][packed[:, 4:].expand(-1, 3, -1, -1) == 1] == 0).all()
    mine, _ = purify_fast.nn.RandomMask(block=2)(X, mask=packed[:, 4:])
    torch.testing.assert_close(mine, packed)
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
