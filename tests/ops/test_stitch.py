from __future__ import annotations

from importlib import import_module

import pytest
import torch

from purify_fast.ops import random_transform, stitch

op = import_module("purify_fast.ops.stitch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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


def test_stitch_of_the_paper(backend):
    """RT3: every block from the pass that hides it; the gradient of pass i is its mask."""
    packed, owners = random_transform(torch.rand(2, 3, 256, 256), torch.tensor([5]), torch.arange(2), num_passes=4)
    constants = torch.tensor([0.5, -1.0, 0.25, 2.0])
    passes = constants.repeat(2)[:, None, None, None].expand(8, 3, 256, 256).clone().requires_grad_()
    out = stitch(passes, owners)
    assert torch.equal(out.mean((1, 2, 3)), constants.mean().expand(2))
    for image in out:
        blocks = image.unflatten(2, (8, 32)).unflatten(1, (8, 32))
        assert torch.equal(blocks, blocks[:1, :, :1, :, :1].expand_as(blocks))
        assert [int((blocks[0, :, 0, :, 0] == c).sum()) for c in constants] == [16] * 4
    (grad,) = torch.autograd.grad(out.sum(), passes)
    assert torch.equal(grad, packed[:, 4:].expand_as(grad))
    whole, owners = random_transform(torch.rand(2, 3, 64, 64), torch.tensor([5]), torch.arange(2), num_passes=1)
    assert torch.equal(stitch(whole, owners), whole)


def test_what_is_seen_never_reaches_the_stitched_image(backend):
    """All N passes shown as they came in: the owners' blocks are the hidden ones, 0."""
    packed, owners = random_transform(
        torch.rand(3, 3, 16, 16), torch.tensor([5]), torch.arange(3), block=4, num_passes=4
    )
    assert (stitch(packed[:, :3], owners) == 0).all()


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


def test_any_layout_and_batch_split(backend):
    images, owners = inputs((2, 2, 3, 2, 9, 14, 3, 7))
    before = images.clone()
    wanted = stitch(images, owners)
    padded = torch.full((12, 4, 11, 20), torch.nan)
    padded[:, 1:3, 1:10, 3:17] = images
    strided = owners.transpose(2, 3).contiguous().transpose(2, 3)
    got = stitch(padded[:, 1:3, 1:10, 3:17], strided)
    assert torch.equal(got, wanted) and got.is_contiguous()
    for i in range(4):
        one = stitch(images[3 * i : 3 * i + 3], owners[i // 2 : i // 2 + 1, i % 2 : i % 2 + 1])
        assert torch.equal(one[0], wanted[i])
    assert torch.equal(images, before)
    leaf = images.clone().requires_grad_()
    for grad in (torch.ones(1, 1, 1, 1).expand_as(wanted), torch.ones(4, 9, 14, 2).permute(0, 3, 1, 2)):
        (slope,) = torch.autograd.grad(stitch(leaf, owners), leaf, grad)
        assert torch.equal(slope.unflatten(0, (4, 3)).sum(1), torch.ones_like(wanted))


def test_gradcheck():
    images, owners = inputs((2, 1, 3, 2, 4, 6, 2, 3), torch.float64)
    for function in (op._stitch, op.reference):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, owners, 3), images.requires_grad_())


def test_contract(backend, contract):
    sets = [
        (*inputs(SHAPES[0]), 4),
        (*inputs(SHAPES[3], torch.bfloat16), 3),
        (*inputs(SHAPES[0], memory_format=NHWC), 4),
        (*inputs((1, 2, 3, 1, 4, 4, 2, 2)), 3),
        (inputs(SHAPES[0])[0][:0], inputs(SHAPES[0])[1][:, :0], 4),
    ]
    contract.registered(op.OP.handle, *sets)
    contract.registered(op.BACKWARD.handle, *((op.reference(*s), *s[1:]) for s in sets))


def test_compiles(backend, contract):
    def make(size: int) -> tuple:
        images, owners = inputs((1, size, 4, 3, 8, 8, 2, 2))
        return images.requires_grad_(), owners

    contract.compiles(lambda images, owners: stitch(2 * images, owners), make)


def test_compiles_in_channels_last(backend):
    images, owners = inputs(SHAPES[0], memory_format=NHWC)
    torch._dynamo.reset()
    got = torch.compile(stitch, fullgraph=True, backend="aot_eager")(images, owners)
    assert torch.equal(got, stitch(images, owners)) and got.is_contiguous(memory_format=NHWC)


def test_export(backend):
    class Stitch(torch.nn.Module):
        def forward(self, images, owners):
            return stitch(images.flatten(0, 1), owners)

    images, owners = inputs((1, 4, 4, 3, 8, 8, 2, 2))
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Stitch(), (images.unflatten(0, (4, 4)), owners), dynamic_shapes=({0: batch}, {1: batch})
    )
    images, owners = inputs((1, 7, 4, 3, 8, 8, 2, 2))
    assert torch.equal(program.module()(images.unflatten(0, (7, 4)), owners), stitch(images, owners))


def test_modes_and_func_grad(backend):
    images, owners = inputs(SHAPES[0], torch.bfloat16)
    expected = stitch(images, owners)
    with torch.autocast("cpu", torch.float16), torch.inference_mode():
        out = stitch(images, owners)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    got = torch.func.grad(lambda x: stitch(x, owners).float().sum())(images)
    assert torch.equal(got.unflatten(0, (-1, 4)).sum(1), torch.ones_like(expected))


def test_what_the_op_cannot_do():
    images, owners = inputs((1, 1, 3, 2, 4, 6, 2, 3))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: op._stitch(x, owners, 3))(images[None])
    leaf = images.requires_grad_()
    out = op._stitch(leaf, owners, 3)
    (first,) = torch.autograd.grad(out, leaf, torch.ones_like(out, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, r"images must be .* got torch.float32 \[3, 8, 8\]"),
        ({"images": torch.zeros(6, 3, 8, 8).int()}, r"images must be .* got torch.int32 \[6, 3, 8, 8\]"),
        ({"owners": torch.zeros(1, 2, 4, 4)}, r"owners must be uint8 .* got torch.float32 \[1, 2, 4, 4\]"),
        ({"owners": torch.zeros(2, 4, 4).byte()}, r"owners must be uint8 .* got torch.uint8 \[2, 4, 4\]"),
        ({"owners": torch.zeros(1, 2, 4, 4, device="meta").byte()}, "images are on cpu, owners on meta"),
        ({"owners": torch.zeros(1, 2, 3, 4).byte()}, "grid of 3 x 4 blocks must divide the images, 8 x 8"),
        ({"owners": torch.zeros(1, 2, 0, 4).byte()}, "grid of 0 x 4 blocks must divide the images, 8 x 8"),
        ({"owners": torch.zeros(1, 4, 4, 4).byte()}, "6 images are no whole number of passes for owners of 1 x 4"),
        ({"owners": torch.zeros(1, 0, 4, 4).byte()}, "6 images are no whole number of passes for owners of 1 x 0"),
        ({"images": torch.zeros(0, 3, 8, 8)}, "0 images are no whole number of passes for owners of 1 x 2"),
    ],
)
def test_errors(change, message):
    arguments = {"images": torch.zeros(6, 3, 8, 8), "owners": torch.zeros(1, 2, 4, 4, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=message):
        stitch(**(arguments | change))
