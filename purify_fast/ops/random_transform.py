"""The random transforms of AToP: noise, clip, scale to [-1, 1], hide blocks, and the two planes a generator takes.

    z = clip(x + sigma n, 0, 1),   n ~ N(0, 1) from the Philox stream TRANSFORM_NOISE, element (c H + h) W + w
    t = (1 - m) (2 z - 1),         m = 1 where hidden, constant on blocks
    packed = [t, 1, m]             along the channels

RT1: sigma = 0. RT2: sigma > 0. RT3: N passes over one noisy image; its blocks are divided into N equal sets, and pass i
hides set i. Source: AToP (arXiv 2401.16352), section 3; the defaults are those of its official code.

How a mask is drawn is this package's own choice. Every one of the G blocks gets a 32-bit key of the stream MASK, and
its rank among the keys decides; blocks with equal keys are ranked by their index. RT1 and RT2 hide the blocks of the
least ranks. In RT3 pass rank // (G / N) hides a block, and is called its owner.

Backward draws n again from the seed. Only the owners of the blocks are kept for it, one byte for each block:

    dx = sum over draws and passes of 2 (1 - m) [0 <= x + sigma n <= 1] dt
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._tensors import memory_format, without_autocast
from .dispatch.examples import LAYOUTS, ROWS, examples, laid_out, stream, uniform
from .dispatch.gradient import differentiable, needs_gradient
from .dispatch.registry import Launcher, define_backward, define_op, wide
from .philox import Stream, check_stream, philox

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: The owner of a block is stored as one byte.
MOST_PASSES = 255


def _noise(x: Tensor, seed: Tensor, sample_ids: Tensor, samples: int) -> Tensor:
    """Normals, [S, B, C, H, W]."""
    numel = x.shape[1] * x.shape[2] * x.shape[3]
    drawn = philox(seed, sample_ids, numel, stream=Stream.TRANSFORM_NOISE, distribution="normal", draws=samples)
    return drawn.transpose(0, 1).unflatten(2, x.shape[1:])


def _noisy(x: Tensor, seed: Tensor, sample_ids: Tensor, sigma: float, samples: int) -> Tensor:
    """x + sigma n, [S, B, C, H, W]; [1, B, C, H, W] without noise."""
    clean = wide(x)[None]
    return clean if sigma == 0 else clean + sigma * _noise(x, seed, sample_ids, samples).to(clean.dtype)


def _ranks(seed: Tensor, ids: Tensor, blocks: int, samples: int) -> Tensor:
    """The rank of every block among the keys of its image, [S, B, blocks]."""
    bits = philox(seed, ids, blocks, stream=Stream.MASK, distribution="bits", draws=samples)
    keys = bits.transpose(0, 1).long() & 0xFFFFFFFF
    return keys.argsort(stable=True).argsort()


def on_pixels(owners: Tensor, height: int, width: int) -> Tensor:
    """Owners of blocks [S, B, rows, columns] as owners of pixels [S, B, H, W]."""
    samples, batch, rows, columns = owners.shape
    tiles = owners[:, :, :, None, :, None].expand(-1, -1, -1, height // rows, -1, width // columns)
    return tiles.reshape(samples, batch, height, width)


def _hidden(owners: Tensor, num_passes: int, height: int, width: int) -> Tensor:
    """The pixels that each pass hides, bool [S, B, N, 1, H, W]."""
    first = 1 if num_passes == 0 else 0
    own = torch.arange(first, first + (num_passes or 1), device=owners.device)
    return on_pixels(owners, height, width)[:, :, None, None] == own[:, None, None, None]


def reference(x: Tensor, seed: Tensor, sample_ids: Tensor, sigma: float, *settings: Any) -> tuple[Tensor, Tensor]:
    """The definition: float32 arithmetic (float64 for float64).

    The settings are those of the schema, and of `random_transform` but for the mask. With num_passes = 0 (RT1 and RT2)
    there is one pass: ``masked_blocks`` blocks are hidden and their owner is 1; the owner of the others is 0.
    """
    block, masked_blocks, num_passes, samples, shared_mask, dtype, channels_last = settings
    height, width = x.shape[2:]
    grid = height // block, width // block
    blocks = grid[0] * grid[1]
    rank = _ranks(seed, sample_ids.new_zeros(1) if shared_mask else sample_ids, blocks, samples)
    owner = (rank < masked_blocks if num_passes == 0 else rank // (blocks // num_passes)).to(torch.uint8)
    owners = owner.unflatten(-1, grid).expand(samples, sample_ids.shape[0], *grid).contiguous()
    hidden = _hidden(owners, num_passes, height, width)
    noisy = _noisy(x, seed, sample_ids, sigma, samples)
    # At 0 and at 1 the gradient passes. torch.clamp is not used, since versions of torch differ in its gradient there.
    clipped = torch.where((noisy >= 0) & (noisy <= 1), noisy, noisy.detach().clamp(0, 1))
    t = torch.where(hidden, 0, (2 * clipped - 1)[:, :, None]).to(dtype)
    # autocast for CPUs refuses to join tensors of float16
    with without_autocast(x.device):
        packed = torch.cat([t, torch.ones_like(t[:, :, :, :1]), hidden.to(dtype)], dim=3)
    return packed.flatten(0, 2).contiguous(memory_format=memory_format(channels_last)), owners


def reference_backward(
    grad: Tensor, x: Tensor, owners: Tensor, seed: Tensor, sample_ids: Tensor, sigma: float, num_passes: int
) -> Tensor:
    """The gradient of x, [B, C, H, W] in x's dtype, from that of ``packed``."""
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


#: Shape, block, num_passes (0: RT1 and RT2), sigma, draws and layout, with the dtypes that represent it on a GPU. Some
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
RACED = tuple(
    ((ROWS, 3, 32, 32), 4, passes, sigma, 1, layout)
    for passes, sigma in ((0, 0.25), (4, 0.25), (0, 0.0))
    for layout in LAYOUTS
)


def _arguments(*setting: Any) -> tuple[Any, ...]:
    shape, block, passes, sigma, draws, layout, dtype, seed = setting
    x, masked_blocks = laid_out(uniform(seed, *shape).to(dtype), layout), (shape[2] // block) * (shape[3] // block) // 3
    return x, *stream(seed), sigma, block, masked_blocks, passes, draws, False, dtype, bool(layout)


def _saved(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of backward beside the gradient."""
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
    raced=examples(_arguments, RACED),
    triton=Launcher("random_transform", "forward"),
    replaces_many=("",),
)
BACKWARD = define_backward(
    OP,
    "(Tensor grad, Tensor x, Tensor owners, Tensor seed, Tensor sample_ids, float sigma, SymInt num_passes) -> Tensor",
    reference=reference_backward,
    saved=_saved,
    constants=1,
    changes={"exact": False, "slack": 0.0},
)


_random_transform = differentiable(OP.handle, lambda *given: BACKWARD(*given), _saved, constants=1)


def random_transform(
    x: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
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
    """Transform images at random, and pack them as a generator takes them.

    Args:
        x: ``[B, C, H, W]`` in [0, 1]; float16, bfloat16, float32 or float64.
        seed: int64 ``[1]``, on x's device.
        sample_ids: int64 ``[B]``, the global index of each image (see `philox`).
        sigma: standard deviation of the noise in the unit of x, at least 0. RT1 is sigma = 0.
        block: side of a block in pixels. It must divide H and W, and gives G = (H / block) (W / block) blocks.
        mask_ratio: share of the blocks that RT1 and RT2 hide, in [0, 1): int(mask_ratio G) of them. RT3 ignores it.
            Under torch.compile another value compiles again, as another block, num_passes or samples may; another
            sigma does not.
        num_passes: None for RT1 and RT2. N for RT3, a divisor of G from 1 to min(G, 255). With N = 1 the one pass
            hides everything.
        samples: S, the number of independent draws of noise and mask for every image.
        shared_mask: draw one mask for the whole batch in every draw, as the official code does; else one per image.
        dtype: dtype of the output; x's by default. t is rounded to it at the end.
        channels_last: whether the output is in the channels_last memory format.

    Returns:
        ``packed [S B N, C + 2, H, W]``, in which the pass varies fastest, then the image, then the draw (N = 1 for RT1
        and RT2). Its channels are t, in [-1, 1] and 0 where hidden; ones; and m, 1 where hidden and 0 elsewhere.
        ``owners``, uint8 ``[S, B, H / block, W / block]``: for RT1 and RT2 1 where a block is hidden and 0 elsewhere;
        for RT3 the pass that hides the block (see `stitch`).

    Raises:
        TypeError: seed or sample_ids is not a tensor.
        ValueError: a wrong shape, dtype, device or setting.

    NaN stays where it is seen; what is hidden is 0 whatever x holds. The gradient reaches x only, first order; at both
    ends of the clip it passes. Masks have the same bits in every backend, noise agrees to a few ulp; deterministic
    given the seed. Keeps its dtypes under autocast; ``vmap`` is not supported by the kernels.
    """
    dtype = x.dtype if dtype is None else dtype
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(f"x must be floating point [B, C, H, W], got {x.dtype} {list(x.shape)}")
    check_stream(seed, sample_ids, x.shape[0], x=x)
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
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    # 1/49 of 49 blocks is one block, although the product is 0.999.. in floating point
    masked_blocks = min(int(mask_ratio * blocks + 1e-6), blocks - 1) if num_passes is None else 0
    kernel = _random_transform if needs_gradient(x) else OP.handle
    call = reference if OP.uses_reference(x.device, x.dtype, x.numel()) else kernel
    passes = num_passes or 0
    return call(x, seed, sample_ids, sigma, block, masked_blocks, passes, samples, shared_mask, dtype, channels_last)
