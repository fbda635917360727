from importlib import import_module

import pytest
import torch
from op_cases import cases

from purify_fast.ops import stitch

op = import_module("purify_fast.ops.stitch")
PLAIN, NHWC = torch.contiguous_format, torch.channels_last
#: samples, batch, passes, channels, height, width, rows, columns
SHAPES = (
    (2, 2, 4, 3, 12, 20, 3, 5),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (1, 3, 2, 1, 8, 8, 2, 8),
    (1, 2, 3, 5, 9, 14, 3, 7),
    (2, 0, 4, 3, 8, 8, 2, 2),
    (1, 3, 4, 3, 128, 96, 4, 3),
)
#: Those with which every dtype is tested.
RAGGED = ((2, 2, 4, 3, 12, 20, 3, 5), (1, 2, 3, 5, 9, 14, 3, 7))


def inputs(shape: tuple, dtype=torch.float32, memory_format=PLAIN) -> tuple:
    samples, batch, passes, channels, height, width, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples * batch * passes, channels, height, width, generator=generator).to(dtype)
    owners = torch.randint(passes, (samples, batch, rows, columns), generator=generator, dtype=torch.uint8)
    return images.contiguous(memory_format=memory_format), owners


def picked(images: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Block by block, in loops."""
    samples, batch, rows, columns = owners.shape
    count = samples * batch
    each = images.unflatten(0, (count, -1)) if count else images[:, None]
    out = torch.empty_like(each[:, 0])
    tall, wide = images.shape[2] // rows, images.shape[3] // columns
    for i in range(count):
        for r in range(rows):
            for c in range(columns):
                at = (..., slice(r * tall, (r + 1) * tall), slice(c * wide, (c + 1) * wide))
                out[i][at] = each[i, int(owners.flatten(0, 1)[i, r, c])][at]
    return out


@pytest.mark.parametrize("memory_format", [PLAIN, NHWC], ids=str)
@pytest.mark.parametrize(("shape", "dtype"), cases(SHAPES, *RAGGED), ids=str)
def test_values_and_gradients(backend, poisoned, shape, dtype, memory_format):
    images, owners = inputs(shape, dtype, memory_format)
    memory_format = memory_format if len(images) else PLAIN  # nothing is contiguous, above all
    leaf = images.clone().requires_grad_()
    out = stitch(leaf, owners)
    assert torch.equal(out, picked(images, owners)) and out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    grad = torch.linspace(1, 2, out.numel()).view_as(out).to(dtype).contiguous(memory_format=memory_format)
    (got,) = torch.autograd.grad(out, leaf, grad)
    passes = shape[2] if len(out) else 1
    owner = owners.repeat_interleave(shape[4] // shape[6], 2).repeat_interleave(shape[5] // shape[7], 3).flatten(0, 1)
    for i in range(passes):
        wanted = grad * (owner == i)[:, None]
        assert torch.equal(got.unflatten(0, (-1, passes))[:, i] if len(out) else got, wanted)
    assert got.dtype == dtype and got.is_contiguous(memory_format=memory_format)


def test_only_the_owner_is_read(backend):
    images, owners = inputs(SHAPES[0])
    owned = op._owned(owners, 4, 12, 20).expand(-1, -1, 3, -1, -1).flatten(0, 1)
    assert torch.equal(stitch(torch.where(owned, images, torch.nan), owners), stitch(images, owners))
    out = stitch(torch.where(owned, torch.nan, images), owners)
    assert out.isnan().all()


def test_a_block_without_an_owner_is_zero(backend):
    images, owners = inputs((1, 2, 3, 5, 9, 14, 3, 7))
    owners[0, 1, 2, 6] = 3
    leaf = images.clone().requires_grad_()
    out = stitch(leaf, owners)
    assert (out[1, :, 6:, 12:] == 0).all() and (out[1, :, :6] != 0).all()
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert (grad[3:, :, 6:, 12:] == 0).all() and grad.sum() == out.numel() - 5 * 3 * 2


@pytest.mark.parametrize("passes", [65536, 65537])
def test_passes_beyond_the_owners_numbers_get_nothing(backend, passes):
    x = torch.ones(passes, 1, 1, 1, requires_grad=True)
    stitch(x, torch.zeros(1, 1, 1, 1, dtype=torch.uint8)).sum().backward()
    assert x.grad.nonzero()[:, 0].tolist() == [0]
