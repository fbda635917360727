from __future__ import annotations

from importlib import import_module

import torch

from purify_fast.kernels import stitch as kernel

op = import_module("purify_fast.ops.stitch")
#: samples, batch, passes, channels, height, width, rows, columns
SHAPES = ((2, 2, 4, 3, 12, 20, 3, 5), (1, 3, 2, 1, 1, 1, 1, 1), (1, 2, 3, 5, 9, 14, 3, 7), (1, 1, 2, 3, 32, 48, 8, 3))


def inputs(shape: tuple, dtype=torch.float32) -> tuple:
    samples, batch, passes, channels, height, width, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples * batch * passes, channels, height, width, generator=generator).to(dtype)
    owners = torch.randint(passes, (samples, batch, rows, columns), generator=generator, dtype=torch.uint8)
    return images, owners, passes


def test_only_the_owner_is_read():
    images, owners, passes = inputs(SHAPES[0])
    owned = op._owned(owners, passes, 12, 20).expand(-1, -1, 3, -1, -1).flatten(0, 1)
    wanted = kernel.forward(images, owners, passes)
    assert torch.equal(kernel.forward(torch.where(owned, images, torch.nan), owners, passes), wanted)
    images[0] = torch.nan
    assert torch.equal(kernel.forward(images, owners, passes).isnan().flatten(1).any(1).nonzero(), torch.tensor([[0]]))


def test_strangers_own_nothing():
    images, owners, passes = inputs((1, 4, 3, 2, 9, 14, 3, 7))
    whole = kernel.forward(images, owners, passes)
    owners[0, 0, 0, 0] = 3  # no such pass
    out = kernel.forward(images, owners, passes)
    assert (out[0, :, :3, :2] == 0).all() and torch.equal(out[0, :, 3:], whole[0, :, 3:])
    assert (kernel.backward(torch.ones_like(out), owners, passes)[:3, :, :3, :2] == 0).all()
