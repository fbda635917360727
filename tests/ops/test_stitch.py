import itertools
from importlib import import_module

import pytest
import torch

from purify_fast.ops import stitch

op = import_module("purify_fast.ops.stitch")
#: samples, batch, passes, channels, height, width, rows, columns
SHAPE = (2, 2, 4, 3, 12, 20, 3, 5)


def inputs(shape: tuple) -> tuple:
    samples, batch, passes, channels, height, width, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples * batch * passes, channels, height, width, generator=generator)
    owners = torch.randint(passes, (samples, batch, rows, columns), generator=generator, dtype=torch.uint8)
    return images, owners


@pytest.mark.interpreter
def test_every_block_is_that_of_its_owner(backend):
    """Sample by sample and block by block, in loops."""
    images, owners = inputs(SHAPE)
    each, out = images.unflatten(0, (4, 4)), stitch(images, owners)
    for i, owner in enumerate(owners.flatten(0, 1)):
        for r, c in itertools.product(range(3), range(5)):
            at = (slice(None), slice(4 * r, 4 * r + 4), slice(4 * c, 4 * c + 4))
            assert torch.equal(out[i][at], each[i, int(owner[r, c])][at])


@pytest.mark.interpreter
def test_only_the_owner_is_read(backend):
    images, owners = inputs(SHAPE)
    owned = op._owned(owners, 4, 12, 20).expand(-1, -1, 3, -1, -1).flatten(0, 1)
    assert torch.equal(stitch(torch.where(owned, images, torch.nan), owners), stitch(images, owners))
    assert stitch(torch.where(owned, torch.nan, images), owners).isnan().all()


@pytest.mark.interpreter
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
