from importlib import import_module

import pytest
import torch

from purify_fast.kernels import random_transform as kernel

op = import_module("purify_fast.ops.random_transform")
SEED = torch.tensor([-987654321])


@pytest.mark.parametrize(("shared", "num_passes"), [(False, 0), (False, 16), (True, 1), (True, 4)])
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
    def offsets(out_ptr, block, planes, plane, N: tl.constexpr, ALIGNED: tl.constexpr):
        given = tl.zeros((), tl.int32) + block
        channel, pixel, _ = kernel._begin(given, planes, plane, PIXELS=4, ALIGNED=ALIGNED, ROWS=8)
        at, _ = kernel._places(pixel, plane, N, 4, PIXELS=4, ALIGNED=ALIGNED, ROWS=8)
        tl.store(out_ptr + tl.arange(0, 32), channel.to(tl.int64) * plane + at)

    plane, tile, out = 2**26, 1000000, torch.empty(32, dtype=torch.int64)
    offsets[(1,)](out, tile * 40 + 35, 40, plane, N=1, ALIGNED=False)
    assert torch.equal(out, 35 * plane + torch.arange(32) + 32 * tile) and out.min() > 2**31
    # A row is the beginning of the 400 numbers of four pixels.
    offsets[(1,)](out, 2 * tile, 1, plane, N=100, ALIGNED=True)
    first = 2 * tile * 32 * 100 + torch.arange(8) * 400
    assert torch.equal(out, (first[:, None] + torch.arange(4)).flatten()) and out.min() > 2**31


#: Images, the dtypes of images and packed images, the block's side and the passes. Threads compute all planes of eight
#: pixels, or of four; then images with too many channels, and with planes that end within a group of random numbers.
PACKED = {
    "three channels": ((2, 3, 16, 16), torch.float32, torch.bfloat16, 4, 0),
    "three channels in passes": ((1, 3, 8, 12), torch.float32, torch.float32, 4, 3),
    "one channel": ((2, 1, 8, 12), torch.float16, torch.float32, 2, 0),
    "four channels, planes of four pixels and one row": ((1, 4, 6, 6), torch.float16, torch.float16, 2, 3),
    "five channels": ((1, 5, 8, 8), torch.float32, torch.float16, 4, 2),
    "eight channels": ((1, 8, 4, 6), torch.float32, torch.float16, 2, 0),
    "nine channels": ((1, 9, 4, 4), torch.float32, torch.float16, 2, 2),
    "odd planes": ((1, 2, 9, 15), torch.float32, torch.bfloat16, 3, 5),
}

#: Those that take the interpreter longest.
LONG = ("three channels", "eight channels", "nine channels")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in LONG)) for case in PACKED])
def test_both_memory_formats_have_the_same_bits(poisoned, case):
    """Those of NaN and of the gradients, too. Every element is written: new memory is full of NaN."""
    shape, dtype, packed_dtype, block, passes = PACKED[case]
    x, ids = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype), torch.tensor([2**40 + 3, 7])
    x[0, 0, 0, :2] = torch.tensor([float("nan"), 0.0])
    drawn = SEED, ids[: shape[0]], 0.25
    masks = block, shape[2] * shape[3] // block**2 // 3, passes, 2, False, packed_dtype
    plain, owners = kernel.forward(x, *drawn, *masks, False)
    last, same_owners = kernel.forward(x, *drawn, *masks, True)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(owners, same_owners) and torch.equal(bits(plain), bits(last))
    grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).to(packed_dtype)
    both = [grad.contiguous(memory_format=form) for form in (torch.contiguous_format, torch.channels_last)]
    grads = [kernel.backward(grad, x, owners, *drawn, passes) for grad in both]
    assert torch.equal(*map(bits, grads)) and grads[0].count_nonzero() > x.numel() // 4


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)
