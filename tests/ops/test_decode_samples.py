from importlib import import_module

import pytest
import torch
import torch.utils.checkpoint
from op_cases import compiles

from purify_fast.kernels.decoder_sizes import COLUMN_TILE, Geometry, Layer
from purify_fast.ops import Stream, decode_prior, philox

op = import_module("purify_fast.ops.decode_samples")
SEED = torch.tensor([11])


def test_latents_are_the_named_stream(backend):
    ids = torch.tensor([4, 1, 2**35])
    z = op.latents(SEED, ids, 5, 7)
    assert torch.equal(z, philox(SEED, ids, 7, stream=Stream.LATENT, distribution="normal", draws=5))
    assert torch.equal(op.latents(SEED, ids, 2, 7), z[:, :2])  # more samples never change the first
    assert torch.equal(op.latents(SEED, ids[1:], 5, 7), z[1:])


GEOMETRY = Geometry(6, (4, 2, 3), (Layer(5, 3, 2, 1, 4, 5), Layer(2, 2, 1, 1, 3, 4)))


def packed_arguments(batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple:
    """condition, seed, ids, packed, biases of a decoder with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    packed, biases = op.pack(normal(4, 2, 3, 6), [normal(4, 5, 3, 3), normal(5, 2, 2, 2)], [normal(5), normal(2)])
    real = torch.float64 if dtype == torch.float64 else torch.float32
    ids = torch.arange(batch) * 7 + 1
    return normal(batch, 24).to(real), SEED, ids, packed.to(dtype), biases.to(real)


def opaque(condition, *rest):
    """Through the op and its own backward, as a kernel is called."""
    return op._decode(condition, *rest, True)[0]


@pytest.mark.parametrize("squash", [False, True])
def test_gradients_of_the_op(squash):
    condition, *rest = packed_arguments()
    rest += [GEOMETRY.numbers(), 3, 0.2, squash, False, torch.float64]
    condition.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: opaque(c, *rest), condition)
    assert torch.autograd.gradcheck(lambda c: op.reference(c, *rest, False)[0], condition)


def test_a_backward_under_autocast_keeps_the_precision_of_the_weights():
    condition, *rest = packed_arguments(dtype=torch.float32)
    condition.requires_grad_()
    loss = opaque(condition, *rest, GEOMETRY.numbers(), 3, 0.2, True, False, torch.float32).square().sum()
    expected = torch.autograd.grad(loss, condition, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(loss, condition)[0], expected)


@pytest.fixture
def served(monkeypatch):
    """The op is called, as where a kernel serves."""
    monkeypatch.setattr(type(op.OP), "uses_reference", lambda *_: False)


def test_a_gradient_keeps_the_signs_of_the_maps_and_nothing_is_kept_without_one(served):
    condition, seed, ids, packed, biases = packed_arguments()
    kept: list[torch.Tensor] = []

    def decoded(condition):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            return op.decode_prior(condition, seed, ids, packed, biases, GEOMETRY, 3)

    with torch.no_grad():
        decoded(condition.requires_grad_())
    decoded(condition.detach())
    assert not kept
    decoded(condition)
    words = sum(h * w * c // 32 for h, w, c in GEOMETRY.inputs())
    (signs,) = (x for x in kept if x.dtype == torch.int32)
    assert signs.shape == (6, words) == (6, 2 * 3 + 4 * 5)
    assert sorted(x.numel() for x in kept) == sorted([6 * words, 6 * 2 * 3 * 4, packed.numel(), biases.numel()])
    maps = op.maps(condition, seed, ids, op.unpack(packed, biases, GEOMETRY), GEOMETRY, samples=3, slope=0.2)
    for x, positive in zip(maps[:-1], op._positive(signs, GEOMETRY), strict=True):
        assert torch.equal(x > 0, positive) and 0.2 < positive.double().mean() < 0.8


def test_a_second_backward_and_a_checkpoint_have_the_same_gradient(served):
    condition, *rest = packed_arguments()

    def decoded(condition):
        return op.decode_prior(condition, *rest, GEOMETRY, 3).square().sum()

    def gradient(loss, **options):
        return torch.autograd.grad(loss, condition, **options)[0]

    loss = decoded(condition.requires_grad_())
    first = gradient(loss, retain_graph=True)
    again = torch.utils.checkpoint.checkpoint(decoded, condition, use_reentrant=False)
    assert first.any() and torch.equal(gradient(loss), first) and torch.equal(gradient(again), first)


def test_white_pixels_keep_their_gradient(served):
    """The image is in bfloat16, where the sigmoid of 6.5 is 1."""
    condition, seed, ids, packed, biases = packed_arguments(2, torch.bfloat16)
    biases[-COLUMN_TILE:] = 6.5
    images = op.decode_prior(condition.requires_grad_(), seed, ids, packed, biases, GEOMETRY, 3, dtype=torch.bfloat16)
    assert images.dtype == torch.bfloat16 and (images == 1).float().mean() > 0.3
    assert torch.autograd.grad(images[images == 1].sum(), condition)[0].abs().max() > 0


@pytest.mark.slow
def test_decode_prior_compiles():
    def make(size: int) -> tuple:
        condition, _, ids, *_ = packed_arguments(size, torch.float32)
        return condition.requires_grad_(), ids

    _, seed, _, packed, biases = packed_arguments(1, torch.float32)
    for call in (None, opaque):

        def run(condition, ids, call=call):
            if call is None:
                return decode_prior(condition, seed, ids, packed, biases, GEOMETRY, 3)
            numbers = GEOMETRY.numbers()
            return call(condition, seed, ids, packed, biases, numbers, 3, 0.2, True, False, torch.float32)

        compiles(run, make, (6, 8, 13), compiler="aot_eager")
