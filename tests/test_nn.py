"""The modules of purify_fast.nn compute what PyTorch's functions and their ops compute."""

import pytest
import torch
from torch.nn import functional as F

import purify_fast
from purify_fast import ops

X, SEED = torch.rand(3, 3, 8, 8), torch.tensor([1])
STUDENT, TEACHER = torch.randn(2, 4, 6, 5, dtype=torch.float64)
MODULES = purify_fast.nn


def test_a_list_of_layers_has_the_distances_of_each():
    layers = MODULES.CosineDistance()([STUDENT] * 2, [TEACHER] * 2)
    torch.testing.assert_close(layers, torch.stack([MODULES.CosineDistance()(STUDENT, TEACHER)] * 2, 1))


def test_attention_reads_the_cells_that_a_mask_leaves():
    features, hidden = torch.randn(2, 4, 8, 8), F.pad(torch.ones(2, 1, 8, 8), (0, 56, 0, 56))
    wanted = ops.contextual_attention(features, ops.key_validity(hidden, (4, 4)))
    assert torch.equal(MODULES.ContextualAttention()(features, hidden), wanted)


def test_a_teacher_with_a_gradient_is_refused():
    with pytest.raises(ValueError, match=r"teacher must not require a gradient.*teacher.detach"):
        MODULES.CosineDistance()(STUDENT, TEACHER.clone().requires_grad_())


def test_a_random_mask_hides_and_stitch_puts_together():
    packed, owners = purify_fast.nn.RandomMask(block=2, ratio=0.5)(X)
    assert (owners.sum((0, 2, 3)) == 8).all() and (packed[:, :3][packed[:, 4:].expand(-1, 3, -1, -1) == 1] == 0).all()
    passes, owners = purify_fast.nn.RandomMask(block=2)(X, num_passes=4)
    assert purify_fast.nn.Stitch()(passes, owners).shape == (3, 5, 8, 8)


def _kl(mu, logvar):
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)


#: A module, the plain PyTorch that it replaces, and the shapes of its inputs, of which the first gets a gradient.
REPLACED = {
    "CosineDistance": (
        MODULES.CosineDistance(),
        lambda a, b: 1 - F.cosine_similarity(a.flatten(1), b.flatten(1)),
        [(4, 6, 5), (4, 6, 5)],
    ),
    "ReconstructionLoss": (
        MODULES.ReconstructionLoss(),
        lambda a, b: F.binary_cross_entropy_with_logits(a, b.sigmoid(), reduction="none").flatten(1).sum(1),
        [(4, 3, 5), (4, 3, 5)],
    ),
    "mean ReconstructionLoss": (
        MODULES.ReconstructionLoss(reduction="mean"),
        lambda a, b: F.binary_cross_entropy_with_logits(a, b.sigmoid(), reduction="sum") / len(a),
        [(4, 3, 5), (4, 3, 5)],
    ),
    "KL of SampleLatent": (lambda a, b: MODULES.SampleLatent()(a, b, seed=SEED)[1], _kl, [(4, 5), (4, 5)]),
    "Aggregate": (MODULES.Aggregate(), lambda a: a.logsumexp(1), [(4, 6, 5)]),
    "mean Aggregate": (MODULES.Aggregate("mean"), lambda a: a.mean(1), [(4, 6, 5)]),
    "GatedELU": (MODULES.GatedELU(), lambda a: F.elu(a[:, :3]) * a[:, 3:].sigmoid(), [(4, 6, 5)]),
}


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", REPLACED)
def test_a_module_takes_the_place_of_pytorch(name, mode):
    """In bfloat16, both sides are near the result in float64: each rounds at other places."""
    module, plain, shapes = REPLACED[name]
    source, dtype = torch.Generator().manual_seed(0), torch.bfloat16 if mode == "bfloat16" else torch.float32
    given = [torch.randn(shape, generator=source).to(dtype) for shape in shapes]

    def computed(function, first, *others):
        leaf = first.clone().requires_grad_()
        values = [leaf, *others]
        if mode == "autocast" and leaf.dtype == torch.float32:
            # A layer before the module gives bfloat16.
            values = [F.linear(value, torch.eye(value.shape[-1])) for value in values]
        if function is module and name.endswith("ReconstructionLoss"):
            values[1] = values[1].sigmoid()
        result = function(*values)
        weight = torch.linspace(1, 2, result.numel(), dtype=torch.float64).view_as(result)
        (result.double() * weight).sum().backward()
        return result, leaf.grad

    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        got, theirs = computed(module, *given), computed(plain, *given)
    exact = computed(plain, *(value.double() for value in given))
    for one, other, truth in zip(got, theirs, exact, strict=True):
        if mode == "float32":
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        size = truth.abs().max()
        allowed = 1e-5 if mode == "float32" else 0.02
        assert one.shape == other.shape and one.isfinite().all()
        assert (one.double() - truth).abs().max() <= allowed * size
        # No less exact than the code that the module replaces, up to the rounding of a result in bfloat16.
        assert (one.double() - truth).abs().max() <= (other.double() - truth).abs().max() + size * 2**-8


@pytest.mark.parametrize("module", [MODULES.CosineDistance, MODULES.ReconstructionLoss])
def test_another_reduction_is_refused(module):
    with pytest.raises(ValueError, match="reduction must be one of none, mean, sum, got 'batchmean'"):
        module(reduction="batchmean")
