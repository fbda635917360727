from __future__ import annotations

from importlib import import_module

import numpy
import pytest
import torch

from purify_fast.kernels import philox as kernel
from purify_fast.ops import Stream

op = import_module("purify_fast.ops.philox")
SEED = torch.tensor([-0x0123456789ABCDEF])
IDS = torch.tensor([7, 0, -1, 2**40 + 3, 2**31])


@pytest.mark.parametrize("numel", [1, 3, 4, 31, 130, 1025])
@pytest.mark.parametrize("distribution", [0, 1, 2])
def test_same_stream_as_the_reference(ulps, poisoned, distribution, numel):
    arguments = (numel, int(Stream.MASK), distribution, 3, 2**32 - 2)  # draws that wrap
    got, expected = kernel.philox(SEED, IDS, *arguments), op.reference(SEED, IDS, *arguments)
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.is_contiguous()
    if distribution == 2:
        assert ulps(got, expected) <= 6  # the interpreter takes NumPy's float32 log, up to 3.2 ulp from the truth
    else:
        assert torch.equal(got, expected)


def test_published_zeros():
    bits = kernel.philox(torch.tensor([0]), torch.tensor([0]), 4, 0, 0).flatten().tolist()
    assert [b & 0xFFFFFFFF for b in bits] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("stream", list(Stream), ids=lambda s: s.name)
def test_every_stream(stream):
    arguments = (SEED, IDS, 9, int(stream), 0)
    assert torch.equal(kernel.philox(*arguments), op.reference(*arguments))


def test_any_split_gives_the_same_numbers():
    whole = kernel.philox(SEED, IDS, 37, 1, 2, 5)
    for cut in range(1, len(IDS)):
        parts = [kernel.philox(SEED, ids, 37, 1, 2, 5) for ids in (IDS[:cut], IDS[cut:])]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(kernel.philox(SEED, IDS.repeat_interleave(2)[::2], 37, 1, 2, 5), whole)
    chunks = [kernel.philox(SEED, IDS, 37, 1, 2, n, first) for first, n in ((0, 1), (1, 3), (4, 1))]
    assert torch.equal(torch.cat(chunks, 1), whole)
    assert torch.equal(kernel.philox(SEED, IDS, 20, 1, 2, 5), whole[..., :20])


@pytest.mark.parametrize(("ids", "numel"), [(IDS[:0], 5), (IDS, 0)])
def test_nothing_to_draw(ids, numel):
    assert kernel.philox(SEED, ids, numel, 1, 2, 3).shape == (len(ids), 3, numel)


def test_cos_and_sin_to_one_ulp(ulps):
    """Every 8191th of the 2^24 angles, and those next to the multiples of a quarter turn."""
    import triton
    import triton.language as tl

    @triton.jit
    def both(angle_ptr, cos_ptr, sin_ptr, size, WIDTH: tl.constexpr):
        at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        cos, sin = kernel.cos_sin(tl.load(angle_ptr + at, mask=at < size, other=0.0))
        tl.store(cos_ptr + at, cos, mask=at < size)
        tl.store(sin_ptr + at, sin, mask=at < size)

    near = torch.cat([torch.arange(-3, 4) + quarter * 2**22 for quarter in range(5)]).clamp(0, 2**24 - 1)
    angle = torch.cat([torch.arange(0, 2**24, 8191), near]).float() * numpy.float32(2 * numpy.pi * 2**-24).item()
    cos, sin = torch.empty_like(angle), torch.empty_like(angle)
    both[(triton.cdiv(angle.numel(), 1024),)](angle, cos, sin, angle.numel(), WIDTH=1024)
    assert ulps(cos, angle.double().cos().float()) <= 2
    assert ulps(sin, angle.double().sin().float()) <= 2
