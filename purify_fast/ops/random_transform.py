"""AToP's random transforms add noise, clip, scale to [-1, 1], hide blocks, and append two planes for the generator.

    z = clip(x + sigma n, 0, 1),   n ~ N(0, 1) from the Philox stream TRANSFORM_NOISE, element (c H + h) W + w
    t = (1 - m) (2 z - 1),         m = 1 where hidden, constant on blocks;    packed = [t, 1, m] along the channels
    dx = sum over draws and passes of 2 (1 - m) [0 <= x + sigma n <= 1] dt,   where the backward draws n again

Source: AToP (arXiv 2401.16352), section 3. RT1 has sigma = 0, and RT2 has sigma > 0. RT3 makes N passes over one noisy
image; pass i hides the i-th of N equal sets of blocks. In this package, each of the G blocks gets a 32-bit key from the
stream MASK, and a rank by key, then index. RT1 and RT2 hide the lowest ranks. RT3's pass rank // (G / N) owns a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._settings import without_autocast
from .._tensors import FLOATING, check_floating, memory_format
from .dispatch.examples import LAYOUTS, ROWS, examples, laid_out, stream, uniform
from .dispatch.gradient import define_backward, differentiable, needs_gradient
from .dispatch.registry import define_op, wide
from .philox import Stream, default_stream, philox

#: The owner of a block is stored as one byte.
MOST_PASSES = 255


def _noisy(x: Tensor, seed: Tensor, sample_ids: Tensor, sigma: float, samples: int) -> Tensor:
    """Return x + sigma n, [S, B, C, H, W], or [1, B, C, H, W] without noise."""
    clean, numel = wide(x)[None], x.shape[1] * x.shape[2] * x.shape[3]
    if sigma == 0:
        return clean
    drawn = philox(seed, sample_ids, numel, stream=Stream.TRANSFORM_NOISE, distribution="normal", draws=samples)
    return clean + sigma * drawn.transpose(0, 1).unflatten(2, x.shape[1:]).to(clean.dtype)


def on_pixels(owners: Tensor, height: int, width: int) -> Tensor:
    """Expand owners of blocks [S, B, rows, columns] to owners of pixels [S, B, H, W]."""
    samples, batch, rows, columns = owners.shape
    tiles = owners[:, :, :, None, :, None].expand(-1, -1, -1, height // rows, -1, width // columns)
    return tiles.reshape(samples, batch, height, width)


def _hidden(owners: Tensor, num_passes: int, height: int, width: int) -> Tensor:
    """Return the pixels that each pass hides, bool [S, B, N, 1, H, W]."""
    first = 1 if num_passes == 0 else 0
    own = torch.arange(first, first + (num_passes or 1), device=owners.device)
    return on_pixels(owners, height, width)[:, :, None, None] == own[:, None, None, None]


def reference(x: Tensor, seed: Tensor, sample_ids: Tensor, sigma: float, *settings: Any) -> tuple[Tensor, Tensor]:
    """Compute the op by PyTorch. RT1 and RT2 have num_passes = 0, and 1 owns ``masked_blocks`` blocks, 0 the others."""
    block, masked_blocks, num_passes, samples, shared_mask, dtype, channels_last = settings
    height, width = x.shape[2:]
    grid = height // block, width // block
    blocks = grid[0] * grid[1]
    ids = sample_ids.new_zeros(1) if shared_mask else sample_ids
    bits = philox(seed, ids, blocks, stream=Stream.MASK, distribution="bits", draws=samples)
    # The rank of every block among the keys of its image, [S, B, blocks].
    rank = (bits.transpose(0, 1).long() & 0xFFFFFFFF).argsort(stable=True).argsort()
    owner = (rank < masked_blocks if num_passes == 0 else rank // (blocks // num_passes)).to(torch.uint8)
    owners = owner.unflatten(-1, grid).expand(samples, sample_ids.shape[0], *grid).contiguous()
    return _packed(_noisy(x, seed, sample_ids, sigma, samples), owners, num_passes, dtype, channels_last), owners


def _packed(noisy: Tensor, owners: Tensor, num_passes: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Clip and scale noisy images [S or 1, B, C, H, W], hide the blocks, and append the planes."""
    height, width = noisy.shape[-2:]
    hidden = _hidden(owners, num_passes, height, width)
    # Both ends of the clip pass the gradient, in contrast to torch.clamp in some versions of torch.
    clipped = torch.where((noisy >= 0) & (noisy <= 1), noisy, noisy.detach().clamp(0, 1))
    t = torch.where(hidden, 0, (2 * clipped - 1)[:, :, None]).to(dtype)
    # torch.cat raises an error for float16 under CPU autocast.
    with without_autocast(noisy.device):
        packed = torch.cat([t, t.new_ones((*t.shape[:3], 1, height, width)), hidden.to(dtype)], dim=3)
    return packed.flatten(0, 2).contiguous(memory_format=memory_format(channels_last))


def reference_backward(
    grad: Tensor, x: Tensor, owners: Tensor, seed: Tensor, sample_ids: Tensor, sigma: float, num_passes: int
) -> Tensor:
    """Return the gradient of x, [B, C, H, W] in x's dtype, from the gradient of ``packed``."""
    samples, batch = owners.shape[:2]
    noisy = _noisy(x, seed, sample_ids, sigma, samples)
    of_passes = grad[:, : x.shape[1]].unflatten(0, (samples, batch, num_passes or 1)).to(noisy.dtype)
    total = torch.where(_hidden(owners, num_passes, *x.shape[2:]), 0, of_passes).sum(2)
    return torch.where((noisy >= 0) & (noisy <= 1), 2 * total, 0).sum(0).to(x.dtype).contiguous()


def _fake(x: Tensor, seed: Tensor, ids: Tensor, sigma: float, *settings: Any) -> tuple[Tensor, Tensor]:
    block, _, num_passes, samples, _, dtype, channels_last = settings
    batch, channels, height, width = x.shape
    shape = (samples * batch * (num_passes or 1), channels + 2, height, width)
    packed = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(channels_last))
    return packed, x.new_empty((samples, batch, height // block, width // block), dtype=torch.uint8)


#: By shape, block, num_passes (0 for RT1 and RT2), sigma, draws and layout; for the values see `Example.gpu`. Some
#: shapes have planes whose size is not a multiple of 4.
EXAMPLES = {
    (*setting, layout): letters
    for setting, gpu in {
        ((ROWS, 3, 32, 32), 4, 0, 0.25, 1): ("f", "b"),
        ((ROWS, 2, 9, 15), 3, 5, 0.25, 1): ("", "f"),
        ((ROWS, 3, 12, 20), 4, 5, 0.25, 2): ("", ""),
        ((ROWS, 1, 16, 16), 4, 0, 0.0, 2): ("h", ""),
        ((ROWS, 1, 16, 24), 8, 3, 0.25, 1): ("", ""),
    }.items()
    for layout, letters in zip(LAYOUTS, gpu, strict=True)
}


def _arguments(*setting: Any) -> tuple[Any, ...]:
    shape, block, passes, sigma, draws, layout, dtype, seed = setting
    x, masked_blocks = laid_out(uniform(seed, *shape).to(dtype), layout), (shape[2] // block) * (shape[3] // block) // 3
    return x, *stream(seed), sigma, block, masked_blocks, passes, draws, False, dtype, bool(layout)


def _saved(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of the backward after the gradient: x, owners, seed, sample_ids, sigma, num_passes."""
    return inputs[0], outputs[1], *inputs[1:4], inputs[6]


OP = define_op(
    "random_transform",
    "(Tensor x, Tensor seed, Tensor sample_ids, float sigma, SymInt block, SymInt masked_blocks, "
    "SymInt num_passes, SymInt samples, bool shared_mask, ScalarType dtype, bool channels_last) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    examples=examples(
        _arguments,
        EXAMPLES,
        exact=lambda shape, block, passes, sigma, *_: sigma == 0,
        slack=lambda shape, block, passes, sigma, *_: 16.0 if sigma else 0.0,
    ),
    # From benchmarks/results: kernels.csv of cpu and nvidia-h200, and cpu/ops.csv.
    in_graphs={"cuda": ("",)},
)
BACKWARD = define_backward(
    OP,
    "(Tensor grad, Tensor x, Tensor owners, Tensor seed, Tensor sample_ids, float sigma, SymInt num_passes) -> Tensor",
    reference=reference_backward,
    saved=_saved,
    constants=1,
    changes={"exact": False, "slack": 0.0},
)


_random_transform = differentiable(OP.handle, lambda *args: BACKWARD(*args), _saved, constants=1)


def random_transform(
    x: Tensor,
    seed: Tensor | None = None,
    sample_ids: Tensor | None = None,
    *,
    sigma: float = 0.25,
    block: int = 32,
    mask_ratio: float = 0.25,
    num_passes: int | None = None,
    samples: int = 1,
    shared_mask: bool = False,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Transform images at random, and pack them as the input of a generator.

    Args:
        x: images ``[B, C, H, W]`` in [0, 1]; float16, bfloat16, float32 or float64.
        seed: int64 ``[1]``, on x's device. None: a new seed from PyTorch's generator of this device.
        sample_ids: int64 ``[B]``, the global index of each image (see `philox`). None: 0 to B - 1.
        sigma: standard deviation of the noise in the unit of x, at least 0. RT1 has sigma = 0.
        block: side of a block in pixels. It must divide H and W. An image has G = (H / block) (W / block) blocks.
        mask_ratio: fraction of the blocks that RT1 and RT2 hide, in [0, 1). The number of hidden blocks is
            int(mask_ratio G). RT3 ignores it. Under torch.compile, a new value causes a new compilation.
        num_passes: number N of passes of RT3, a divisor of G from 1 to min(G, 255). With N = 1, the only pass hides
            everything. None stands for RT1 and RT2, which have a single pass.
        samples: S, the number of independent draws of noise and mask for every image.
        shared_mask: True to use the same mask for all images of a batch, as in the official code.
        dtype: dtype of the output, x's by default. t is rounded to it at the end.
        channels_last: True to return the output in the memory format channels_last.

    Returns:
        ``packed [S B N, C + 2, H, W]`` and ``owners``. In packed, the pass varies fastest, then the image, then the
        draw (N = 1 for RT1 and RT2). Its channels are t, which is in [-1, 1] and 0 where hidden; a plane of ones; and
        the mask m, which is 1 where hidden and 0 elsewhere. owners is uint8 ``[S, B, H / block, W / block]``: for RT1
        and RT2, 1 for a hidden block and 0 for the others; for RT3, the index of the pass that hides the block (see
        `stitch`).

    Raises:
        TypeError: seed or sample_ids is neither None nor a tensor.
        ValueError: a shape, dtype, device or setting is wrong.

    A visible NaN remains NaN. Hidden pixels are 0. Only x has a gradient, of first order. Both ends of the clip pass
    the gradient. Masks have the same bits in every backend, and noise differs by a few ulp at most. For a given seed
    the op is deterministic. Autocast does not change its dtypes. The kernels do not support ``vmap``.
    """
    dtype = x.dtype if dtype is None else dtype
    check_floating(x=x)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    seed, sample_ids = default_stream(seed, sample_ids, x.shape[0], x=x)
    height, width = x.shape[2:]
    if block < 1 or height < 1 or width < 1 or height % block or width % block:
        raise ValueError(f"block must be at least 1 and divide the image, got block = {block} for {height} x {width}")
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be finite and not negative, got {sigma}")
    if num_passes is None and not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
    blocks = (height // block) * (width // block)
    most = min(blocks, MOST_PASSES)
    if num_passes is not None and (not 1 <= num_passes <= most or blocks % num_passes):
        raise ValueError(f"num_passes must be 1 to {most} and divide the {blocks} blocks of an image, got {num_passes}")
    if samples < 1 or (isinstance(samples, int) and samples >= 2**63):
        raise ValueError(f"samples must be at least 1 and below 2^63, got {samples}")
    if dtype not in FLOATING:
        raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    # 1e-6 compensates rounding: 1/49 of 49 blocks is one block, although the floating-point product is 0.999...
    masked_blocks = min(int(mask_ratio * blocks + 1e-6), blocks - 1) if num_passes is None else 0
    kernel = _random_transform if needs_gradient(x) else OP.handle
    call = reference if OP.uses_reference(x.device, x.numel()) else kernel
    passes = num_passes or 0
    return call(x, seed, sample_ids, sigma, block, masked_blocks, passes, samples, shared_mask, dtype, channels_last)
