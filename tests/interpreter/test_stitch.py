from __future__ import annotations

from importlib import import_module

import pytest
import torch

from purify_fast.kernels import stitch as kernel

op = import_module("purify_fast.ops.stitch")
FORMATS = (torch.contiguous_format, torch.channels_last)
#: samples, batch, passes, channels, height, width, rows, columns
SHAPES = ((2, 2, 4, 3, 12, 20, 3, 5), (1, 3, 2, 1, 1, 1, 1, 1), (1, 2, 3, 5, 9, 14, 3, 7), (1, 1, 2, 3, 32, 48, 8, 3))


def inputs(shape: tuple, dtype=torch.float32) -> tuple:
    samples, batch, passes, channels, height, width, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples * batch * passes, channels, height, width, generator=generator).to(dtype)
    owners = torch.randint(passes, (samples, batch, rows, columns), generator=generator, dtype=torch.uint8)
    return images, owners, passes


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), (SHAPES[0], torch.bfloat16), (SHAPES[2], torch.float16)],
    ids=str,
)
def test_values_and_gradients(poisoned, shape, dtype, memory_format):
    images, owners, passes = inputs(shape, dtype)
    images = images.contiguous(memory_format=memory_format)
    got, wanted = kernel.forward(images, owners, passes), op.reference(images, owners, passes)
    assert torch.equal(got, wanted) and got.dtype == dtype and got.is_contiguous(memory_format=memory_format)
    grad = torch.randn(got.shape).to(dtype).contiguous(memory_format=memory_format)
    got, wanted = kernel.backward(grad, owners, passes), op.reference_backward(grad, owners, passes)
    assert torch.equal(got, wanted) and got.is_contiguous(memory_format=memory_format)


def test_only_the_owner_is_read():
    images, owners, passes = inputs(SHAPES[0])
    owned = op._owned(owners, passes, 12, 20).expand(-1, -1, 3, -1, -1).flatten(0, 1)
    wanted = kernel.forward(images, owners, passes)
    assert torch.equal(kernel.forward(torch.where(owned, images, torch.nan), owners, passes), wanted)
    images[0] = torch.nan
    assert torch.equal(kernel.forward(images, owners, passes).isnan().flatten(1).any(1).nonzero(), torch.tensor([[0]]))


def test_layouts_splits_strangers_and_empty():
    images, owners, passes = inputs((1, 4, 3, 2, 9, 14, 3, 7))
    whole = kernel.forward(images, owners, passes)
    parts = [kernel.forward(images[3 * i : 3 * i + 3], owners[:, i : i + 1], passes) for i in range(4)]
    assert torch.equal(torch.cat(parts), whole)
    padded = torch.full((12, 4, 11, 20), torch.nan)
    padded[:, 1:3, 1:10, 3:17] = images
    strided = owners.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(kernel.forward(padded[:, 1:3, 1:10, 3:17], strided, passes), whole)
    owners[0, 0, 0, 0] = 3  # no such pass
    out = kernel.forward(images, owners, passes)
    assert (out[0, :, :3, :2] == 0).all() and torch.equal(out[0, :, 3:], whole[0, :, 3:])
    assert (kernel.backward(torch.ones_like(out), owners, passes)[:3, :, :3, :2] == 0).all()
    assert kernel.forward(images[:0], owners[:, :0], passes).shape == (0, 2, 9, 14)
    assert kernel.backward(whole[:0], owners[:, :0], passes).shape == (0, 2, 9, 14)
