"""The random transforms of AToP: noise, clip, scale to [-1, 1], hide blocks, and the two planes a generator takes.

    z = clip(x + sigma n, 0, 1),   n ~ N(0, 1) from the Philox stream TRANSFORM_NOISE, element (c H + h) W + w
    t = (1 - m) (2 z - 1),         m = 1 where hidden, constant on blocks
    packed = [t, 1, m]             along the channels

RT1: sigma = 0. RT2: sigma > 0. RT3: the blocks are parted into N equal sets, and part i hides set i of one noisy image.
Source: AToP (arXiv 2401.16352), section 3; defaults from its official code. The masks are ours: every block gets a
32-bit key of the stream MASK; the k least are missing, or rank // (G / N) is the part that owns it; ties by index.

Backward draws n again from the seed; the owner map is kept, a byte for each block:

    dx = sum over draws and parts of 2 (1 - m) [0 <= x + sigma n <= 1] dt
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._op import define_op, launcher, wide
from .philox import Stream, check_stream, philox

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Owners are bytes.
MOST_PARTS = 255


def _noise(x: Tensor, seed: Tensor, sample_ids: Tensor, samples: int) -> Tensor:
    """Normals, [S, B, C, H, W]."""
    numel = x.shape[1] * x.shape[2] * x.shape[3]
    drawn = philox(seed, sample_ids, numel, stream=Stream.TRANSFORM_NOISE, distribution="normal", draws=samples)
    return drawn.transpose(0, 1).unflatten(2, x.shape[1:])


def _noisy(x: Tensor, seed: Tensor, sample_ids: Tensor, sigma: float, samples: int) -> Tensor:
    """x + sigma n, [S, B, C, H, W]; [1, B, C, H, W] without noise."""
    clean = wide(x)[None]
    return clean if sigma == 0 else clean + sigma * _noise(x, seed, sample_ids, samples).to(clean.dtype)


def _assign(
    seed: Tensor, sample_ids: Tensor, grid: tuple[int, int], missing: int, parts: int, samples: int, shared_mask: bool
) -> Tensor:
    """The owner of every block, uint8 [S, B, *grid]; see `reference` for missing and parts."""
    blocks = grid[0] * grid[1]
    named = sample_ids.new_zeros(1) if shared_mask else sample_ids
    bits = philox(seed, named, blocks, stream=Stream.MASK, distribution="bits", draws=samples)
    keys = bits.transpose(0, 1).long() & 0xFFFFFFFF
    rank = keys.argsort(stable=True).argsort()
    owner = rank < missing if parts == 0 else rank // (blocks // parts)
    return owner.to(torch.uint8).unflatten(-1, grid).expand(samples, sample_ids.shape[0], *grid).contiguous()


def on_pixels(owners: Tensor, height: int, width: int) -> Tensor:
    """Owners of blocks [S, B, rows, columns] as owners of pixels [S, B, H, W]."""
    samples, batch, rows, columns = owners.shape
    tiles = owners[:, :, :, None, :, None].expand(-1, -1, -1, height // rows, -1, width // columns)
    return tiles.reshape(samples, batch, height, width)


def _hidden(owners: Tensor, parts: int, height: int, width: int) -> Tensor:
    """Which pixels each part hides, bool [S, B, N, 1, H, W]."""
    first = 1 if parts == 0 else 0
    part = torch.arange(first, first + (parts or 1), device=owners.device)
    return on_pixels(owners, height, width)[:, :, None, None] == part[:, None, None, None]


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def reference(
    x: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    sigma: float,
    block: int,
    missing: int,
    parts: int,
    samples: int,
    shared_mask: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """The definition: float32 arithmetic (float64 for float64).

    Arguments as in `random_transform`; parts = 0: ``missing`` blocks are hidden, and owned by 1; the others by 0.
    """
    height, width = x.shape[2:]
    owners = _assign(seed, sample_ids, (height // block, width // block), missing, parts, samples, shared_mask)
    hidden = _hidden(owners, parts, height, width)
    noisy = _noisy(x, seed, sample_ids, sigma, samples)
    # both ends pass the gradient: the versions of torch differ in what clamp does there
    clipped = torch.where((noisy >= 0) & (noisy <= 1), noisy, noisy.detach().clamp(0, 1))
    t = torch.where(hidden, 0, (2 * clipped - 1)[:, :, None]).to(dtype)
    packed = torch.cat([t, torch.ones_like(t[:, :, :, :1]), hidden.to(dtype)], dim=3)
    return packed.flatten(0, 2).contiguous(memory_format=_format(channels_last)), owners


def reference_backward(
    grad: Tensor, x: Tensor, owners: Tensor, seed: Tensor, sample_ids: Tensor, sigma: float, parts: int
) -> Tensor:
    """dx [B, C, H, W] in x's dtype, from the gradient of ``packed``."""
    samples, batch = owners.shape[:2]
    noisy = _noisy(x, seed, sample_ids, sigma, samples)
    each = grad[:, : x.shape[1]].unflatten(0, (samples, batch, parts or 1)).to(noisy.dtype)
    total = torch.where(_hidden(owners, parts, *x.shape[2:]), 0, each).sum(2)
    return torch.where((noisy >= 0) & (noisy <= 1), 2 * total, 0).sum(0).to(x.dtype).contiguous()


def _fake(x, seed, sample_ids, sigma, block, missing, parts, samples, shared_mask, dtype, channels_last):
    batch, channels, height, width = x.shape
    shape = (samples * batch * (parts or 1), channels + 2, height, width)
    packed = torch.empty(shape, dtype=dtype, device=x.device, memory_format=_format(channels_last))
    return packed, x.new_empty((samples, batch, height // block, width // block), dtype=torch.uint8)


OP = define_op(
    "random_transform",
    "(Tensor x, Tensor seed, Tensor sample_ids, float sigma, SymInt block, SymInt missing, SymInt parts, "
    "SymInt samples, bool shared_mask, ScalarType dtype, bool channels_last) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    triton=launcher("random_transform", "forward"),
    cpu="cpp",
    why_cpu="fastest in every eager row: benchmarks/results/cpu/ops.md",
)
BACKWARD = define_op(
    "random_transform_backward",
    "(Tensor grad, Tensor x, Tensor owners, Tensor seed, Tensor sample_ids, float sigma, SymInt parts) -> Tensor",
    reference=reference_backward,
    fake=lambda grad, x, owners, seed, sample_ids, sigma, parts: x.new_empty(x.shape),
    triton=launcher("random_transform", "backward"),
    cpu="reference",
    why_cpu="torch.compile beats the C++ kernel in some row: benchmarks/results/cpu/ops.md",
)


class _RandomTransform(torch.autograd.Function):
    @staticmethod
    def forward(x, seed, sample_ids, sigma, block, missing, parts, samples, shared_mask, dtype, channels_last):
        return OP.handle(x, seed, sample_ids, sigma, block, missing, parts, samples, shared_mask, dtype, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, seed, sample_ids, ctx.sigma = inputs[:4]
        ctx.parts = inputs[6]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1], seed, sample_ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        return (BACKWARD(grad, *ctx.saved_tensors, ctx.sigma, ctx.parts), *[None] * 10)


def _check(x, seed, sample_ids, sigma, block, missing, parts, samples, dtype) -> None:
    """ValueError unless the arguments of `random_transform` are as it documents them."""
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(
            f"x must be [B, C, H, W] in float16, bfloat16, float32 or float64, got {x.dtype} {list(x.shape)}"
        )
    check_stream(seed, sample_ids)
    if sample_ids.shape[0] != x.shape[0]:
        raise ValueError(f"sample_ids has {sample_ids.shape[0]} entries for a batch of {x.shape[0]}")
    if x.device != seed.device:
        raise ValueError(f"x is on {x.device}, seed on {seed.device}: they must agree")
    height, width = x.shape[2:]
    if block < 1 or height < 1 or width < 1 or height % block or width % block:
        raise ValueError(f"block must be at least 1 and divide the image, got block = {block} for {height} x {width}")
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be finite and not negative, got {sigma}")
    if parts is None and not 0 <= missing < 1:
        raise ValueError(f"missing must be in [0, 1), got {missing}")
    blocks = (height // block) * (width // block)
    if parts is not None and (not 1 <= parts <= min(blocks, MOST_PARTS) or blocks % parts):
        raise ValueError(
            f"parts must be 1 to {min(blocks, MOST_PARTS)} and divide the {blocks} blocks of an image, got {parts}"
        )
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")


def random_transform(
    x: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    *,
    sigma: float = 0.25,
    block: int = 32,
    missing: float = 0.25,
    parts: int | None = None,
    samples: int = 1,
    shared_mask: bool = False,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Transform images at random, and pack them as a generator takes them.

    Args:
        x: ``[B, C, H, W]`` in [0, 1]; float16, bfloat16, float32 or float64.
        seed: int64 ``[1]``; sample_ids: int64 ``[B]``, global indices (see `philox`).
        sigma: the noise's standard deviation in units of x, at least 0; 0 is RT1.
        block: side of a block in pixels; it divides H and W, G = (H / block) (W / block).
        missing: share of the blocks that RT1 and RT2 hide, in [0, 1): k = int(missing G). RT3 does not use it.
            (Another value recompiles, as another block, parts or samples may; another sigma does not.)
        parts: None for RT1 and RT2; N for RT3: 1 to min(G, 255), a divisor of G. With N = 1 everything is hidden.
        samples: S, independent draws of noise and mask for every image.
        shared_mask: one mask for the whole batch in every draw, as in the official code; else one for every image.
        dtype: of the output, x's by default; t is rounded to it at the end.
        channels_last: the output's memory format.

    Returns:
        ``packed [S B N, C + 2, H, W]``, the last of draw, image and part (N = 1 without parts) varying fastest: t in
        [-1, 1] and 0 where hidden, ones, and m (1 hidden, 0 kept). ``owners``, uint8 ``[S, B, H / block, W / block]``:
        1 missing and 0 kept, or the part that hides the block (see `stitch`).

    Raises:
        ValueError: a wrong shape, dtype, device or setting.

    NaN stays where it is seen; what is hidden is 0 whatever x holds. The gradient reaches x only, first order; both
    ends of the clip pass it. Masks have the same bits in every backend, noise agrees to a few ulp; deterministic given
    the seed. Keeps its dtypes under autocast; ``vmap`` is not supported by the kernels.
    """
    dtype = x.dtype if dtype is None else dtype
    _check(x, seed, sample_ids, sigma, block, missing, parts, samples, dtype)
    blocks = (x.shape[2] // block) * (x.shape[3] // block)
    count = min(int(missing * blocks + 1e-6), blocks - 1) if parts is None else 0  # 1/49 of 49 is one, not 0.999..
    call = reference if OP.plain(x.device) else _RandomTransform.apply
    return call(x, seed, sample_ids, sigma, block, count, parts or 0, samples, shared_mask, dtype, channels_last)
