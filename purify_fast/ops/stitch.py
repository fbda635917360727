"""Images put together from the blocks of several passes: each block from the pass that owns it.

    out[s, b, :, h, w] = images[s, b, owners[s, b, h // bh, w // bw], :, h, w]

The last step of AToP's RT3 (arXiv 2401.16352): sum_i m_i g(t_i, m_i) with masks m_i that tile the image, as a
choice, not a sum of N images. The backward sends every block's gradient to its pass, and 0 to the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._tensors import check_one_device, last_channels, memory_format
from .dispatch.examples import LAYOUTS, ROWS, examples, laid_out, normal
from .dispatch.gradient import differentiable, needs_gradient
from .dispatch.registry import Launcher, define_backward, define_op
from .random_transform import DTYPES, on_pixels


def layout(images: Tensor) -> torch.memory_format:
    """The memory format of the result: channels_last if the images are channels_last and not contiguous."""
    return memory_format(last_channels(images))


def _owned(owners: Tensor, passes: int, height: int, width: int) -> Tensor:
    """The pixels that each pass owns, bool [S * B, N, 1, H, W]."""
    pixels = on_pixels(owners, height, width).flatten(0, 1)[:, None, None]
    return pixels == torch.arange(passes, device=owners.device)[:, None, None, None]


def reference(images: Tensor, owners: Tensor, passes: int) -> Tensor:
    """The definition: [S * B, C, H, W]; passes: N."""
    each = images.unflatten(0, (owners.shape[0] * owners.shape[1], passes))
    # all terms but one are 0: exact, and one fused loop under a compiler, backward too
    out = torch.where(_owned(owners, passes, *images.shape[2:]), each, 0).sum(1)
    return out.contiguous(memory_format=layout(images))


def reference_backward(grad: Tensor, owners: Tensor, passes: int) -> Tensor:
    """The gradient of ``images``, [S * B * N, C, H, W], in grad's dtype and memory format."""
    out = torch.where(_owned(owners, passes, *grad.shape[2:]), grad[:, None], 0).flatten(0, 1)
    return out.contiguous(memory_format=layout(grad))


def _like(x: Tensor, images: int) -> Tensor:
    return torch.empty((images, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout(x))


#: Shape, blocks, passes, layout, and the dtypes that stand for it on a GPU.
EXAMPLES = {
    ((ROWS, 3, 32, 32), (4, 4), 4, ""): "f",
    ((ROWS, 3, 32, 32), (4, 4), 4, "channels_last"): "b",
    ((ROWS, 2, 9, 15), (3, 5), 3, ""): "h",
    ((ROWS, 2, 9, 15), (3, 5), 3, "channels_last"): "",
}
RACED = tuple(((ROWS, 3, 32, 32), (4, 4), 4, layout) for layout in LAYOUTS)


def _arguments(*setting: Any) -> tuple[Tensor, Tensor, int]:
    shape, grid, passes, layout, dtype, seed = setting
    owners = torch.randint(passes, (1, ROWS, *grid), generator=torch.Generator().manual_seed(seed))
    images = normal(seed, shape[0] * passes, *shape[1:]).to(dtype)
    return laid_out(images, layout), owners.to(torch.uint8), passes


OP = define_op(
    "stitch",
    "(Tensor images, Tensor owners, SymInt passes) -> Tensor",
    reference=reference,
    fake=lambda images, owners, passes: _like(images, owners.shape[0] * owners.shape[1]),
    examples=examples(_arguments, EXAMPLES, exact=True),
    raced=examples(_arguments, RACED, exact=True),
    triton=Launcher("stitch", "forward"),
    replaces_many=("",),
)
BACKWARD = define_backward(
    OP,
    "(Tensor grad, Tensor owners, SymInt passes) -> Tensor",
    reference=reference_backward,
    fake=lambda grad, owners, passes: _like(grad, grad.shape[0] * passes),
    saved=lambda inputs, outputs: inputs[1:],
)


def _passes(count: int, results: int) -> int:
    """The number of passes of an image, from the numbers of all images and of the results; 1 without results."""
    return count // results if results else 1


# The number of passes is computed inside: Dynamo loses a quotient of dynamic sizes that it is given.
_stitch = differentiable(
    lambda images, owners: OP.handle(images, owners, _passes(images.shape[0], owners.shape[0] * owners.shape[1])),
    lambda grad, owners, count: BACKWARD(grad, owners, _passes(count, grad.shape[0])),
    lambda inputs, outputs: (inputs[1], inputs[0].shape[0]),
)


def stitch(images: Tensor, owners: Tensor) -> Tensor:
    """Put one image together from N passes.

    Args:
        images: ``[S * B * N, C, H, W]``, the N passes of an image next to each other; float16, bfloat16, float32 or
            float64, contiguous or channels_last (anything else is copied).
        owners: uint8 ``[S, B, rows, columns]``, the pass each block is taken from, as `random_transform` returns them;
            rows divides H, columns divides W. A block whose owner is N or more is 0.

    Returns:
        ``[S * B, C, H, W]`` in images' dtype and memory format; every element a copy.

    Raises:
        ValueError: a wrong shape, dtype or device.

    Other passes are not read there, and may hold NaN. First-order gradients only; deterministic; the kernels do not
    support ``vmap``.
    """
    if images.dim() != 4 or images.dtype not in DTYPES:
        raise ValueError(f"images must be floating point [S * B * N, C, H, W], got {images.dtype} {list(images.shape)}")
    if owners.dim() != 4 or owners.dtype != torch.uint8:
        raise ValueError(f"owners must be uint8 [S, B, rows, columns], got {owners.dtype} {list(owners.shape)}")
    check_one_device(images=images, owners=owners)
    samples, batch, rows, columns = owners.shape
    height, width = images.shape[2:]
    if rows < 1 or columns < 1 or height < 1 or width < 1 or height % rows or width % columns:
        raise ValueError(f"owners' grid of {rows} x {columns} blocks must divide the images, {height} x {width}")
    if images.shape[0] % (samples * batch or 1) or (images.shape[0] == 0) != (samples * batch == 0):
        raise ValueError(f"{images.shape[0]} images are no whole number of passes for owners of {samples} x {batch}")
    if needs_gradient(images) and not OP.uses_reference(images.device, images.dtype, images.numel()):
        return _stitch(images, owners)
    return OP(images, owners, _passes(images.shape[0], samples * batch))
