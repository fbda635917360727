from importlib import import_module

import pytest
import torch

from purify_fast.kernels import philox as stream
from purify_fast.kernels import random_transform as kernel

op = import_module("purify_fast.ops.random_transform")
SEED = torch.tensor([-987654321])
PLAIN, NHWC = torch.contiguous_format, torch.channels_last
#: batch, channels, height, width, block: planes that are no multiple of 4, several programs for a plane, one pixel
SHAPES = ((2, 3, 12, 20, 4), (1, 1, 1, 1, 1), (2, 2, 9, 15, 3), (1, 3, 32, 64, 16))


def inputs(shape: tuple, dtype=torch.float32) -> tuple:
    x = torch.rand(shape[:4], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return x, SEED, torch.arange(shape[0]) * 3 - 1


@pytest.fixture
def own_noise(monkeypatch):
    """The reference with the kernel's normals, which differ by a few ulp: the rest can be compared to the bit."""

    def noise(x, seed, sample_ids, samples):
        numel = x[0].numel()
        drawn = stream.forward(seed, sample_ids, numel, kernel.TRANSFORM_NOISE, 2, samples)
        return drawn.transpose(0, 1).reshape(samples, *x.shape)

    monkeypatch.setattr(op, "_noise", noise)


def settings(shape: tuple, num_passes: int) -> tuple:
    """(sigma, block, masked_blocks, num_passes) for the launchers."""
    block = shape[4]
    count = (shape[2] // block) * (shape[3] // block)
    return 0.25, block, count // 3, num_passes if count % (num_passes or 1) == 0 else 1


@pytest.mark.parametrize(
    ("shape", "num_passes", "dtype"),
    [
        *((shape, num_passes, torch.float32) for shape, num_passes in zip(SHAPES, (5, 0, 5, 4), strict=True)),
        (SHAPES[0], 0, torch.bfloat16),
        (SHAPES[2], 1, torch.float16),
    ],
    ids=str,
)
def test_values_and_gradients(within_budget, poisoned, own_noise, shape, num_passes, dtype):
    x, seed, ids = inputs(shape, dtype)
    sigma, *rest = settings(shape, num_passes)
    for samples, shared, out, last in ((1, False, dtype, False), (2, True, torch.float32, True)):
        arguments = (x, seed, ids, sigma, *rest, samples, shared, out, last)
        (packed, owners), same = kernel.forward(*arguments), op.reference(*arguments)
        assert torch.equal(owners, same[1]) and packed.is_contiguous(memory_format=NHWC if last else PLAIN)
        if out == torch.bfloat16:
            torch.testing.assert_close(packed, same[0], rtol=2**-7, atol=2**-7)  # the interpreter truncates
        else:
            assert torch.equal(packed, same[0])
        grad = torch.randn(packed.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        grad = grad.to(out).contiguous(memory_format=NHWC if last else PLAIN)
        got = kernel.backward(grad, x, owners, seed, ids, sigma, rest[2])
        golden = op.reference_backward(grad.double(), x.double(), owners, seed, ids, sigma, rest[2])
        within_budget(got, golden, op.reference_backward(grad, x, owners, seed, ids, sigma, rest[2]))


@pytest.mark.parametrize("num_passes", [0, 1, 4, 16])
@pytest.mark.parametrize("shared", [False, True])
def test_owners_have_the_same_bits(shared, num_passes):
    """A grid below, of and above one tile; ids and draws of 32 bits and more."""
    ids = torch.tensor([7, -1, 2**40 + 3])
    for height, width in ((4, 4), (8, 8), (12, 20)):
        mask = {"masked_blocks": height * width // 3, "num_passes": num_passes, "samples": 2, "shared_mask": shared}
        got, images = kernel._assign(SEED, ids, (height, width), **mask), torch.zeros(3, 1, height, width)
        wanted = op.reference(images, SEED, ids, 0.0, 1, *mask.values(), torch.float32, False)[1]
        assert torch.equal(got, wanted)


def test_ties_go_by_index(monkeypatch):
    """Under seed 0 two of 1,024 blocks of this sample have one key, and 648 blocks have smaller ones."""
    monkeypatch.setattr(kernel, "TILE", 512)  # the interpreter takes as long for a small one
    mask = {"masked_blocks": 649, "num_passes": 0, "samples": 1, "shared_mask": False}
    owners = kernel._assign(torch.tensor([0]), torch.tensor([1037]), (32, 32), **mask)
    assert owners.flatten()[[84, 843]].tolist() == [1, 0] and owners.sum() == 649


def test_offsets_are_64_bit():
    import triton
    import triton.language as tl

    @triton.jit
    def offsets(out_ptr, block, planes, plane, LAST: tl.constexpr, ALIGNED: tl.constexpr):
        channel, _, pixel, _ = kernel._pixels(tl.zeros((), tl.int32) + block, planes, plane, ALIGNED, 8)
        begin, at = kernel._place(pixel, channel, planes, plane, LAST)
        tl.store(out_ptr + tl.arange(0, 32), begin + at)

    planes, plane, tile, channel = 40, 2**26, 1000000, 35
    pixel = torch.arange(32) + 32 * tile
    for last, wanted in ((False, channel * plane + pixel), (True, pixel * planes + channel)):
        assert wanted.max() > 2**30 and (last or wanted.max() > 2**31)
        out = torch.empty(32, dtype=torch.int64)
        offsets[(1,)](out, tile * planes + channel, planes, plane, LAST=last, ALIGNED=not last)
        assert torch.equal(out, wanted)


@pytest.mark.parametrize(("side", "dtype"), [(4, torch.bfloat16), (8, torch.float16), (8, torch.float32)], ids=str)
def test_neighbours_share_an_owner(side, dtype):
    """Blocks of 4 and of 8 pixels, in pairs of groups and alone; more pixels than a program has."""
    x, seed, ids = inputs((2, 2, 40, 5 * side, side), dtype)
    arguments = (x, seed, ids, 0.0, side, 0, 5, 2, False, dtype, False)
    (packed, owners), same = kernel.forward(*arguments), op.reference(*arguments)
    assert torch.equal(owners, same[1])
    torch.testing.assert_close(packed, same[0], rtol=0, atol=2**-7 if dtype == torch.bfloat16 else 0)
    grad = torch.ones_like(packed)
    got = kernel.backward(grad, x, owners, seed, ids, 0.0, 5)
    torch.testing.assert_close(got, op.reference_backward(grad, x, owners, seed, ids, 0.0, 5))
