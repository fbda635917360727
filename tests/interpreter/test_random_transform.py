from importlib import import_module

import pytest
import torch

from purify_fast.kernels import random_transform as kernel

op = import_module("purify_fast.ops.random_transform")
SEED = torch.tensor([-987654321])


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
