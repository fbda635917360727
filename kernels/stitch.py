"""`stitch` in Triton: every element from the pass that owns its block, and back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import is_channels_last, memory_format, on, tile


@triton.jit
def _owner(
    owners_ptr, image, start, inside, channels, plane, width, tall, wide, columns, blocks,
    CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The owners of the elements from ``start`` on of one image."""
    lane = tl.arange(0, WIDTH)
    if CHANNELS_LAST:  # the long divisions are of scalars
        pixel = (start // channels).to(tl.int32) + ((start % channels).to(tl.int32) + lane) // channels
    else:
        pixel = ((start % plane).to(tl.int32) + lane) % plane
    block = pixel // width // tall * columns + pixel % width // wide
    return tl.load(owners_ptr + image * blocks + block, mask=inside, other=0).to(tl.int32)


@triton.jit
def _forward(
    images_ptr, owners_ptr, out_ptr, size, channels, plane, width, tall, wide, columns, blocks, passes, tiles,
    CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    image, start = pid // tiles, pid % tiles * WIDTH
    element = start + tl.arange(0, WIDTH)
    inside = element < size
    owner = _owner(
        owners_ptr, image, start, inside=inside, channels=channels, plane=plane, width=width, tall=tall, wide=wide,
        columns=columns, blocks=blocks, CHANNELS_LAST=CHANNELS_LAST, WIDTH=WIDTH,
    )  # fmt: skip
    at = (image * passes + owner) * size + element
    tl.store(out_ptr + image * size + element, tl.load(images_ptr + at, mask=inside & (owner < passes), other=0.0),
             mask=inside)  # fmt: skip


@triton.jit
def _backward(
    grad_ptr, owners_ptr, out_ptr, size, channels, plane, width, tall, wide, columns, blocks, passes, tiles,
    CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    image, start = pid // tiles, pid % tiles * WIDTH
    element = start + tl.arange(0, WIDTH)
    inside = element < size
    owner = _owner(
        owners_ptr, image, start, inside=inside, channels=channels, plane=plane, width=width, tall=tall, wide=wide,
        columns=columns, blocks=blocks, CHANNELS_LAST=CHANNELS_LAST, WIDTH=WIDTH,
    )  # fmt: skip
    grad = tl.load(grad_ptr + image * size + element, mask=inside, other=0.0)
    for part in range(passes):
        own = tl.where(owner == part, grad, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (image * passes + part) * size + element, own, mask=inside)


def _run(kernel, x: Tensor, owners: Tensor, passes: int, images: int) -> Tensor:
    """x: what is read, [.., C, H, W]; images: how many are written."""
    last = is_channels_last(x)
    x = x if last else x.contiguous()
    out = torch.empty((images, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=memory_format(last))
    if out.numel() == 0:
        return out
    samples, batch, rows, columns = owners.shape
    _, channels, height, width = x.shape
    size = channels * height * width
    block, warps = tile(size, x)
    tiles = triton.cdiv(size, block)
    with on(x):
        kernel[(samples * batch * tiles,)](
            x, owners.contiguous(), out, size, channels, height * width, width, height // rows, width // columns,
            columns, rows * columns, passes, tiles, CHANNELS_LAST=last, WIDTH=block, num_warps=warps,
        )  # fmt: skip
    return out


def forward(images: Tensor, owners: Tensor, passes: int) -> Tensor:
    """[S * B, C, H, W] in images' memory format."""
    return _run(_forward, images, owners, passes, owners.shape[0] * owners.shape[1])


def backward(grad: Tensor, owners: Tensor, passes: int) -> Tensor:
    """[S * B * N, C, H, W] in grad's memory format."""
    return _run(_backward, grad, owners, passes, grad.shape[0] * passes)
