"""`stitch` in Triton: every element is copied from the pass that owns its block, and every gradient to that pass."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, grid, is_channels_last, memory_format, program, tile
from ._launch import launch


@triton.jit
def _groups(owners_ptr, sizes, CHANNELS_LAST: tl.constexpr, GROUPS: tl.constexpr):
    """Return this program's groups of neighboring elements, which of them exist, and their owners: [GROUPS, 1].

    A line of a block of the mask consists of whole groups, so a thread divides once for all elements of its group.
    ``line`` is the number of groups in a line of the image. ``cell`` is the number of groups in a line of a block. The
    divisions are unsigned and use 32 bits.
    """
    # owners_ptr: [blocks], uint8
    groups, line, height, cell, tall, columns = sizes
    group = tl.program_id(0).to(tl.uint32) * GROUPS + tl.arange(0, GROUPS)
    inside = group < tl.cast(groups, tl.uint32)
    at = group // tl.cast(line, tl.uint32)
    column = (group - at * tl.cast(line, tl.uint32)) // tl.cast(cell, tl.uint32)
    # In channels_last, an image has a single line for each y.
    y = at if CHANNELS_LAST else at % tl.cast(height, tl.uint32)
    block = y // tl.cast(tall, tl.uint32) * tl.cast(columns, tl.uint32) + column
    owner = tl.load(owners_ptr + block, mask=inside, other=0).to(tl.int32)
    return group[:, None], inside[:, None], owner[:, None]


@triton.jit(do_not_specialize=["images", "groups", "line", "height", "cell", "tall", "columns", "blocks", "passes"])
def _forward(
    images_ptr,  # [images * passes, size]
    owners_ptr,  # [images, blocks], uint8
    out_ptr,  # [images, size]
    images,
    size,
    groups,
    line,
    height,
    cell,
    tall,
    columns,
    blocks,
    passes,
    CHANNELS_LAST: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program copies some elements of one image, each from the pass that owns its block."""
    image, _block = program(images)
    image = image.to(tl.int64)
    sizes = groups, line, height, cell, tall, columns
    group, inside, owner = _groups(owners_ptr + image * blocks, sizes, CHANNELS_LAST=CHANNELS_LAST, GROUPS=GROUPS)
    element = group.to(tl.int64) * VECTOR + tl.arange(0, VECTOR)[None, :]
    at = (image * passes + owner) * size + element
    value = tl.load(images_ptr + at, mask=inside & (owner < passes), other=0.0)
    tl.store(out_ptr + image * size + element, value, mask=inside)


@triton.jit(do_not_specialize=["images", "groups", "line", "height", "cell", "tall", "columns", "blocks", "passes"])
def _backward(
    grad_ptr,  # [images, size]
    owners_ptr,  # [images, blocks], uint8
    out_ptr,  # [images * passes, size]
    images,
    size,
    groups,
    line,
    height,
    cell,
    tall,
    columns,
    blocks,
    passes,
    CHANNELS_LAST: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program writes some elements of the gradients of all passes of one image: 0 in passes that do not own them."""
    image, _block = program(images)
    image = image.to(tl.int64)
    sizes = groups, line, height, cell, tall, columns
    group, inside, owner = _groups(owners_ptr + image * blocks, sizes, CHANNELS_LAST=CHANNELS_LAST, GROUPS=GROUPS)
    element = group.to(tl.int64) * VECTOR + tl.arange(0, VECTOR)[None, :]
    grad = tl.load(grad_ptr + image * size + element, mask=inside, other=0.0)
    for part in range(passes):
        own = tl.where(owner == part, grad, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (image * passes + part) * size + element, own, mask=inside)


def _run(kernel, x: Tensor, owners: Tensor, passes: int, images: int) -> Tensor:
    """Launch a kernel that reads x [.., C, H, W], and return the ``images`` images that it writes."""
    last = is_channels_last(x)
    x = x if last else x.contiguous()
    out = torch.empty((images, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=memory_format(last))
    if out.numel() == 0:
        return out
    samples, batch, rows, columns = owners.shape
    _, channels, height, width = x.shape
    size, line = channels * height * width, width * channels if last else width
    cell = line // columns
    vector = math.gcd(cell, 16 // x.element_size())
    block, warps = tile(size, x)
    sizes = size // vector, line // vector, height, cell // vector, height // rows, columns
    given = x, owners.contiguous(), out, samples * batch, size, *sizes, rows * columns, passes
    shape = {"CHANNELS_LAST": last, "GROUPS": block // vector, "VECTOR": vector, "num_warps": warps}
    launch(kernel, grid(samples * batch, cdiv(size, block)), *given, **shape, enable_fp_fusion=True)
    return out


def forward(images: Tensor, owners: Tensor, passes: int) -> Tensor:
    """Return the stitched images [S * B, C, H, W], in the memory format of ``images``."""
    return _run(_forward, images, owners, passes, owners.shape[0] * owners.shape[1])


def backward(grad: Tensor, owners: Tensor, passes: int) -> Tensor:
    """Return the gradient [S * B * N, C, H, W], in the memory format of ``grad``."""
    return _run(_backward, grad, owners, passes, grad.shape[0] * passes)
