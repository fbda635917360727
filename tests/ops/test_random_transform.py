from importlib import import_module

import pytest
import torch

from purify_fast._tensors import FLOATING
from purify_fast.ops import Stream, philox, random_transform

op = import_module("purify_fast.ops.random_transform")
DTYPES = FLOATING
SEED = torch.tensor([987654321])
#: sample, two of 1,024 blocks that have one key under seed 0, and how many keys are less
TIES = ((1037, [84, 843], 648), (5552, [690, 696], 222))


def images(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def names(batch: int) -> torch.Tensor:
    return torch.arange(batch) * 3 - 1


def test_masks_of_the_paper(backend):
    """256 pixels, blocks of 32: 16 of 64 are hidden, 16,384 pixels; RT3's four masks tile the image."""
    x, ids = images(4, 3, 256, 256), names(4)
    packed, owners = random_transform(x, SEED, ids, samples=2)
    assert packed.shape == (8, 5, 256, 256) and owners.shape == (2, 4, 8, 8) and owners.dtype == torch.uint8
    m = packed[:, 4]
    assert (m.sum((1, 2)) == 16384).all() and m.mean() == 0.25
    blocks = m.unflatten(2, (8, 32)).unflatten(1, (8, 32))
    assert torch.equal(blocks, owners.flatten(0, 1)[:, :, None, :, None].float().expand_as(blocks))
    assert owners.max() == 1 and len(owners.flatten(2).flatten(0, 1).unique(dim=0)) == 8  # one for each draw and image
    assert (packed[:, 3] == 1).all() and (packed[:, :3].abs() <= 1).all()

    packed, owners = random_transform(x, SEED, ids, num_passes=4)
    passes = packed.unflatten(0, (4, 4))
    m = passes[:, :, 4]
    assert (m.sum((2, 3)) == 16384).all() and (m.sum(1) == 1).all()
    for i in range(4):
        assert (owners == i).sum((2, 3)).eq(16).all() and torch.equal(m[:, i, ::32, ::32], (owners[0] == i).float())
    # the noise is drawn once: where two passes see a pixel, they see the same
    seen = (m == 0)[:, :, None]
    shown = torch.where(seen, passes[:, :, :3], -torch.inf).amax(1, keepdim=True)
    assert torch.equal(torch.where(seen, passes[:, :, :3], 0), torch.where(seen, shown, 0))

    packed, owners = random_transform(x, SEED, ids, num_passes=1)
    assert packed.shape == (4, 5, 256, 256) and (owners == 0).all()
    assert (packed[:, :3] == 0).all() and (packed[:, 3:] == 1).all()  # everything is hidden


def test_values_of_the_paper(monkeypatch):
    """Noise, clip, scale, mask, in this order."""
    x, n = torch.tensor([0, 0.25, 0.5, 1]), torch.tensor([-1.0, 1, 2, 1])
    draw = op.philox
    normal = lambda *given, **named: n[None, None] if named["distribution"] == "normal" else draw(*given, **named)  # noqa: E731
    monkeypatch.setattr(op, "philox", normal)
    for masked_blocks, wanted in ((0, [-1.0, 0, 1, 1]), (4, [0.0] * 4)):
        settings = 0.25, 1, masked_blocks, 0, 1, False, torch.float32, False
        packed, _ = op.reference(x.view(1, 1, 1, 4), SEED, names(1), *settings)
        assert packed[0, 0, 0].tolist() == wanted


@pytest.mark.interpreter
def test_gradient_of_the_clip(backend):
    """Both ends pass it, what is hidden does not."""
    x = torch.tensor([0, 1, 0.5, -0.1, 1.1]).view(1, 1, 1, 5).requires_grad_()
    for mask_ratio in (0.0, 0.4):
        packed, owners = random_transform(x, SEED, names(1), sigma=0.0, block=1, mask_ratio=mask_ratio)
        (grad,) = torch.autograd.grad(packed.sum(), x)
        wanted = [2.0 * v * (1 - m) for v, m in zip((1, 1, 1, 0, 0), owners.flatten().tolist(), strict=True)]
        assert grad.flatten().tolist() == wanted
    assert owners.sum() == 2


@pytest.mark.interpreter
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_results_of_any_dtype(backend, out):
    """Their dtype, and that of the images, round the numbers of float64 and no more; masks may be shared."""
    options = {"block": 4, "samples": 2, "shared_mask": True, "channels_last": True}
    for dtype in DTYPES:
        x, ids = images(2, 1, 8, 12, dtype=dtype), names(2)
        leaves = x.clone().requires_grad_(), x.double().requires_grad_()
        packed, owners = random_transform(leaves[0], SEED, ids, **options, dtype=out)
        golden, same_owners = random_transform(leaves[1], SEED, ids, **options, dtype=torch.float64)
        assert torch.equal(owners, same_owners) and packed.dtype == out
        assert packed.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(packed.double(), golden, rtol=0, atol=torch.finfo(out).eps + 1e-6)
        pairs = zip((packed, golden), leaves, strict=True)
        slope, wanted = (torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in pairs)
        assert torch.equal(slope, wanted.to(dtype))


def test_ties_go_by_index(backend):
    """Blocks of one key, with the cut between them."""
    for sample, blocks, rank in TIES:
        named = torch.tensor([0]), torch.tensor([sample])
        keys = philox(*named, 1024, stream=Stream.MASK, distribution="bits").flatten().long() & 0xFFFFFFFF
        assert keys[blocks[0]] == keys[blocks[1]] and (keys < keys[blocks[0]]).sum() == rank
        for masked_blocks, hidden in ((rank, [0, 0]), (rank + 1, [1, 0]), (rank + 2, [1, 1])):
            ratio = (masked_blocks + 0.5) / 1024
            _, owners = random_transform(torch.zeros(1, 1, 32, 32), *named, block=1, mask_ratio=ratio)
            assert owners.flatten()[blocks].tolist() == hidden and owners.sum() == masked_blocks


@pytest.mark.parametrize("side", [7, 10, 14])
def test_k_of_g_is_k_for_every_k(side):
    """k / G in floating point times G may fall short of k."""
    for k in range(side**2):
        _, owners = random_transform(torch.zeros(1, 1, side, side), SEED, names(1), block=1, mask_ratio=k / side**2)
        assert owners.sum() == k
    most = random_transform(torch.zeros(1, 1, side, side), SEED, names(1), block=1, mask_ratio=1 - 1e-9)[1]
    assert most.sum() == side**2 - 1


@pytest.mark.interpreter
def test_pinned_masks(backend):
    """These never change: results depend on them."""
    x, ids = torch.zeros(1, 1, 4, 4), torch.tensor([7])
    seed = torch.tensor([0x0123456789ABCDEF])
    bits = philox(seed, ids, 16, stream=Stream.MASK, distribution="bits").flatten().long() & 0xFFFFFFFF
    order = sorted(range(16), key=lambda i: (int(bits[i]), i))
    _, owners = random_transform(x, seed, ids, block=1)
    assert sorted(order[:4]) == owners.flatten().nonzero().flatten().tolist() == [4, 10, 12, 14]
    _, more = random_transform(x, seed, ids, block=1, samples=3)
    assert torch.equal(more[:1], owners) and not torch.equal(more[1], more[2])
    _, owners = random_transform(x, seed, ids, block=1, num_passes=4)
    assert [int(owners.flatten()[i]) for i in order] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    _, shared = random_transform(x.expand(3, -1, -1, -1), seed, names(3), block=1, shared_mask=True)
    _, zero = random_transform(x, seed, torch.zeros(1, dtype=torch.int64), block=1)
    assert torch.equal(shared, zero.expand(1, 3, 4, 4))  # sample word 0, whatever the ids


def test_a_result_too_large_for_the_caches_is_that_of_its_images():
    """The CPU kernel writes more than 32 MiB past the caches; here no plane begins at a multiple of 16 bytes."""
    x = torch.rand(6, 3, 255, 255, generator=torch.Generator().manual_seed(0))
    seed, ids = torch.tensor([7]), torch.arange(6)

    def made(rows):
        return random_transform(x[rows], seed, ids[rows], sigma=0.25, block=51, num_passes=5)

    whole, owners = made(slice(None))
    assert whole.numel() * whole.element_size() > 32 << 20
    for i in range(len(x)):
        packed, owner = made(slice(i, i + 1))
        assert torch.equal(whole[5 * i : 5 * i + 5], packed) and torch.equal(owners[:, i : i + 1], owner)


@pytest.mark.parametrize("block", [4, 32])
def test_nan_stays_where_it_is_seen(backend, block):
    x, ids = images(2, 3, 2 * block, 2 * block), names(2)
    x[1, 2, block - 1, block + 1] = torch.nan
    leaf = x.clone().requires_grad_()
    packed, owners = random_transform(leaf, SEED, ids, block=block, num_passes=4)
    seen = packed.isnan().unflatten(0, (2, 4))
    assert seen.sum() == 3 and seen[1, :, 2, block - 1, block + 1].sum() == 3
    assert not seen[1, int(owners[0, 1, 0, 1]), 2, block - 1, block + 1]
    for num_passes in (4, None):
        packed, _ = random_transform(leaf, SEED, ids, block=block, num_passes=num_passes)
        grad = torch.ones_like(packed)
        grad[:, :3][packed[:, 4:5].expand(-1, 3, -1, -1) == 1] = torch.nan  # in the holes: it goes nowhere
        grad[:, 3:] = torch.nan
        (slope,) = torch.autograd.grad(packed, leaf, grad)
        assert slope.isfinite().all() and slope[1, 2, block - 1, block + 1] == 0
