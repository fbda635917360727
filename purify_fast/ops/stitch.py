"""Composes images from the blocks of several passes: the last step of AToP's RT3 (arXiv 2401.16352).

With blocks of bh x bw pixels, out[s, b, :, h, w] = images[s, b, owners[s, b, h // bh, w // bw], :, h, w].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._tensors import check_floating, check_one_device, last_channels, memory_format
from .dispatch.examples import ROWS, examples, laid_out, normal
from .dispatch.gradient import define_backward, differentiable, needs_gradient
from .dispatch.registry import define_op
from .random_transform import on_pixels


def _owned(owners: Tensor, passes: int, height: int, width: int) -> Tensor:
    """Return the pixels that each pass owns, bool [S * B, N, 1, H, W]."""
    pixels = on_pixels(owners, height, width).flatten(0, 1)[:, None, None]
    return pixels == torch.arange(passes, device=owners.device)[:, None, None, None]


def reference(images: Tensor, owners: Tensor, passes: int) -> Tensor:
    """Compute the op in plain PyTorch: [S * B, C, H, W]. ``passes`` is N."""
    grouped = images.unflatten(0, (owners.shape[0] * owners.shape[1], passes))
    # All terms except one are 0, so the sum is exact. A compiler fuses it into one loop, also in the backward.
    out = torch.where(_owned(owners, passes, *images.shape[2:]), grouped, 0).sum(1)
    return out.contiguous(memory_format=memory_format(last_channels(images)))


def reference_backward(grad: Tensor, owners: Tensor, passes: int) -> Tensor:
    """Return the gradient of ``images``, [S * B * N, C, H, W], in grad's dtype and memory format."""
    out = torch.where(_owned(owners, passes, *grad.shape[2:]), grad[:, None], 0).flatten(0, 1)
    return out.contiguous(memory_format=memory_format(last_channels(grad)))


def _like(x: Tensor, images: int) -> Tensor:
    form = memory_format(last_channels(x))
    return torch.empty((images, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=form)


#: By shape, blocks, passes and layout; for the values see `Example.gpu`.
EXAMPLES = {
    ((ROWS, 3, 32, 32), (4, 4), 4, ""): "f",
    ((ROWS, 3, 32, 32), (4, 4), 4, "channels_last"): "b",
    ((ROWS, 2, 9, 15), (3, 5), 3, ""): "h",
    ((ROWS, 2, 9, 15), (3, 5), 3, "channels_last"): "",
}


def _arguments(*setting: Any) -> tuple[Tensor, Tensor, int]:
    shape, grid, passes, layout, dtype, seed = setting
    owners = torch.randint(passes, (1, ROWS, *grid), generator=torch.Generator().manual_seed(seed), device="cpu")
    images = normal(seed, shape[0] * passes, *shape[1:]).to(dtype)
    return laid_out(images, layout), owners.to(torch.uint8), passes


OP = define_op(
    "stitch",
    "(Tensor images, Tensor owners, SymInt passes) -> Tensor",
    reference=reference,
    fake=lambda images, owners, passes: _like(images, owners.shape[0] * owners.shape[1]),
    examples=examples(_arguments, EXAMPLES, exact=True),
    # From benchmarks/results: kernels.csv of cpu and nvidia-h200, and cpu/ops.csv.
)
BACKWARD = define_backward(
    OP,
    "(Tensor grad, Tensor owners, SymInt passes) -> Tensor",
    reference=reference_backward,
    fake=lambda grad, owners, passes: _like(grad, grad.shape[0] * passes),
    size=lambda grad, *_: grad.numel(),
    saved=lambda inputs, outputs: inputs[1:],
)


def _passes(count: int, results: int) -> int:
    """Return the number of passes per image, which is ``count / results``; 1 if there are no results."""
    return count // results if results else 1


# These compute the number of passes, because Dynamo cannot track a quotient of dynamic sizes.
_stitch = differentiable(
    lambda images, owners: OP.handle(images, owners, _passes(images.shape[0], owners.shape[0] * owners.shape[1])),
    lambda grad, owners, count: BACKWARD(grad, owners, _passes(count, grad.shape[0])),
    lambda inputs, outputs: (inputs[1], inputs[0].shape[0]),
)


def stitch(images: Tensor, owners: Tensor) -> Tensor:
    """Compose each image from N passes. Each block is copied unchanged from the pass that owns it.

    Args:
        images: ``[S * B * N, C, H, W]``, where the N passes of an image are adjacent; float16, bfloat16, float32 or
            float64; contiguous or channels_last (other layouts are copied).
        owners: uint8 ``[S, B, rows, columns]``, the pass from which each block is copied, as `random_transform` returns
            them. rows divides H, and columns divides W. A block whose owner is N or more becomes 0.

    Returns:
        ``[S * B, C, H, W]`` in images' dtype and memory format.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    A block may have NaN in passes that do not own it. The op has first-order gradients only and is deterministic. The
    kernels do not support ``vmap``.
    """
    check_floating(images=images)
    if images.dim() != 4 or owners.dim() != 4 or owners.dtype != torch.uint8:
        text = "images must be [S * B * N, C, H, W], and owners uint8 [S, B, rows, columns], got "
        raise ValueError(f"{text}{list(images.shape)}, and {owners.dtype} {list(owners.shape)}")
    check_one_device(images=images, owners=owners)
    (samples, batch, rows, columns), (height, width) = owners.shape, images.shape[2:]
    if rows < 1 or columns < 1 or height < 1 or width < 1 or height % rows or width % columns:
        text = f"owners must have rows and columns that divide the sides of images, {height} x {width}, got "
        raise ValueError(f"{text}{rows} x {columns}")
    if images.shape[0] % (samples * batch or 1) or (images.shape[0] == 0) != (samples * batch == 0):
        text = f"the number of images must be a multiple of S * B = {samples} * {batch} (the first two sizes of owners)"
        raise ValueError(f"{text}, and 0 only if S * B is 0, got {images.shape[0]}")
    if needs_gradient(images) and not OP.uses_reference(images.device, images.numel()):
        return _stitch(images, owners)
    return OP(images, owners, _passes(images.shape[0], samples * batch))
