"""Contextual attention: rebuilds every position of a feature map from the patches that are known.

F [C, H, W] are the features of one sample, and P are the pixels of F in even rows and columns. Each position of P, in
the grid h x w = H/2 x W/2, is a query q and a key p. Positions are numbered in row-major order.

    R[q, p]   inner product of two 3x3 patches of P: the patch around q, and the patch K_p around p
    X[q, p]   R[q, p] / max(|K_p|, 1e-4)
    S[q, p]   X after two passes of X[q, p] <- X[q, p] + X[q-1, p-1] + X[q+1, p+1] ("fuse"; the second column-major)
    A[q, p]   v_p softmax_p(scale v_p S[q, p]), where v_p is 1 for a valid key and 0 for an invalid key
    y         1/4 of the sum of overlapping 4x4 patches: the patch at q is the sum over p of A[q, p] (F's patch at p)

The 4x4 patches have stride 2 and padding 1. Everything outside the grid or the image is zero.

Source: DeepFillv2 (Yu et al., CVPR 2018, ICCV 2019), as in AToP (arXiv 2401.16352), except that every sample has its
own keys. The patches are never built. Let G = P'P, and let the offset o shift both positions of G or A:

    R[q, p] = sum over the 9 offsets o in {-1, 0, 1} x {-1, 0, 1} of G[q+o, p+o]
    y_ab = U_ab F_ab,   U_ab[q, p] = 1/4 sum over o in {0, a'} x {0, b'} of A[q+o, p+o]

where F_ab, a, b in {0, 1}, holds the pixels (2i + a, 2j + b), a' = 2a - 1 and b' = 2b - 1. PyTorch computes the matrix
products; the op computes the part between them, from G to U. The sums of R and of the two passes are symmetric, so the
backward uses the same sums. In the backward of U, the offsets are -o.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._settings import without_autocast
from .._tensors import check_floating, check_form, last_channels
from .dispatch.examples import ROWS, examples, normal, uniform, wide_dtype
from .dispatch.gradient import cpu_kernel, define_backward, differentiable, may_save, needs_gradient
from .dispatch.registry import define_op, wide

_SMALLEST_NORM = 1e-4


def _moved(x: Tensor, step: int, dim: int) -> Tensor:
    """Shift both positions of x [B, queries, keys] along ``dim``: the result at i is x at i + step (1 or -1)."""
    groups, size = x.dim() // 2, x.shape[dim]
    padding = [0] * (2 * x.dim())
    for d in (dim, dim + groups):
        x = x.narrow(d, max(step, 0), size - 1)
        padding[2 * (x.dim() - 1 - d) + (step > 0)] = 1
    return F.pad(x, padding)


def _both(x: Tensor, dim: int) -> Tensor:
    """Return x plus x shifted by one position in each direction, along ``dim`` (see `_moved`)."""
    return x + _moved(x, -1, dim) + _moved(x, 1, dim)


def _turned(x: Tensor, height: int, width: int) -> Tensor:
    """Return x [B, L, L] with its positions reordered from row-major to column-major order."""
    return _grids(x, height, width).permute(0, 2, 1, 4, 3).reshape(x.shape)


def _fuse_columns(x: Tensor, height: int, width: int) -> Tensor:
    """Add to each score [B, L, L] its two neighbors on the diagonal, if positions are counted along columns."""
    turned = _turned(x, height, width)
    return _turned(turned + _moved(turned, 1, 1) + _moved(turned, -1, 1), width, height)


def _patches(x: Tensor, height: int, width: int) -> Tensor:
    """Return the sums of x [B, L, L] over the nine offsets. For G, this is R."""
    return _both(_both(_grids(x, height, width), 1), 2).reshape(x.shape)


def _grids(x: Tensor, height: int, width: int) -> Tensor:
    return x.view(*x.shape[:-2], height, width, height, width)


def reference(
    correlation: Tensor, inverse: Tensor, keep: Tensor, height: int, width: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return U ``[B, 4, L, L]`` (second index 2 a + b) and A ``[B, L, L]`` (rows are queries), in plain PyTorch."""
    v = keep.to(correlation.dtype)[:, None]
    scores = _patches(correlation, height, width) * inverse[:, None]
    # The inner call of _both is the first pass of "fuse", with positions in row-major order.
    weights = v * torch.softmax(scale * v * _fuse_columns(_both(scores, 1), height, width), 2)
    x = _grids(weights, height, width)
    by_row = [x + _moved(x, step, 1) for step in (-1, 1)]
    by_both = [x + _moved(x, step, 2) for x in by_row for step in (-1, 1)]
    return (0.25 * torch.stack(by_both, 1)).view(-1, 4, *weights.shape[1:]).to(keep.dtype), weights


def reference_backward(
    grad: Tensor, correlation: Tensor, inverse: Tensor, weights: Tensor, height: int, width: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of G and of the inverse norms, from the gradient of U ``[B, 4, L, L]``; ``weights`` is A."""
    x = _grids(grad.to(correlation.dtype), height, width)
    by_row = [x[:, i] + x[:, i + 1] + _moved(x[:, i], 1, 2) + _moved(x[:, i + 1], -1, 2) for i in (0, 2)]
    x = 0.25 * (by_row[0] + by_row[1] + _moved(by_row[0], 1, 1) + _moved(by_row[1], -1, 1)).reshape(weights.shape)
    x = scale * weights * (x - (weights * x).sum(2, keepdim=True))
    x = _both(_fuse_columns(x, height, width), 1)
    to_inverse = (x * _patches(correlation, height, width)).sum(1)
    return _patches(x * inverse[:, None], height, width), to_inverse


#: By height and width of the grid of keys, and channels; for the values see `Example.gpu`.
EXAMPLES = {(8, 8, 6): "fb", (4, 7, 3): "h", (9, 3, 5): ""}


def _arguments(height: int, width: int, channels: int, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    pixels = normal(seed, ROWS, height * width, channels, scale=0.4)
    # These are not the norms of 3x3 patches, but the op accepts any positive numbers.
    norms = pixels.square().sum(2).clamp_min(1e-4).rsqrt()
    keep = (uniform(seed + 100, ROWS, height * width) > 0.3).to(dtype)
    # All tensors have the dtype of the op's arithmetic, except the mask, which has the dtype of the result.
    inner = wide_dtype(dtype)
    return (pixels @ pixels.mT).to(inner), norms.to(inner), keep, height, width, 1.0


def _saved(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments that follow the gradient in a call of the backward: G, the norms' inverses, A, settings."""
    return *inputs[:2], outputs[1], *inputs[3:]


OP = define_op(
    "contextual_attention",
    "(Tensor correlation, Tensor inverse, Tensor keep, SymInt height, SymInt width, float scale) -> (Tensor, Tensor)",
    reference=reference,
    fake=lambda correlation, inverse, keep, height, width, scale: (
        keep.new_empty((keep.shape[0], 4, *correlation.shape[1:])),
        correlation.new_empty(correlation.shape),
    ),
    examples=examples(_arguments, EXAMPLES),
    # From benchmarks/results: kernels.csv of cpu and (the backward) of nvidia-h200, and cpu/ops.csv.
    in_graphs={"cuda": ("",)},
)
BACKWARD = define_backward(
    OP,
    "(Tensor grad, Tensor correlation, Tensor inverse, Tensor weights, SymInt height, SymInt width, float scale)"
    " -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad, correlation, inverse, weights, height, width, scale: (
        correlation.new_empty(correlation.shape),
        inverse.new_empty(inverse.shape),
    ),
    saved=_saved,
    constants=1,
    # The backward also rounds intermediate sums, which can be as large as its largest output.
    changes={"slack": 32.0},
)


_between = differentiable(OP.handle, lambda *args: BACKWARD(*args), _saved, constants=1)


def _inverse_norms(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return the inverse norms of the 3x3 patches of ``pixels`` [B, L, C], with norms of at least 1e-4: [B, L]."""
    squares = pixels.square().sum(2).view(-1, 1, height, width)
    squares = F.avg_pool2d(squares, 3, 1, 1, divisor_override=1).flatten(1)
    # The squares are clamped before the root, because the gradient of the root at 0 would be NaN.
    return squares.clamp_min(_SMALLEST_NORM**2).rsqrt()


#: Four CPU kernels, which compute the whole function in eager calls. SPLIT copies the pixels of features into the four
#: maps F_ab, called phases: [B, 4, C, L], or [B, 4, L, C] for channels_last. JOIN copies phases back into features, and
#: adds ``more`` to the first phase. SPREAD and SLOPES compute the parts between the matrix products, forward and
#: backward, including the norms of the keys. SPREAD returns U, A and the inverse norms. SLOPES returns the matrix by
#: which the pixels P are multiplied for their gradient.
SPLIT = cpu_kernel("contextual_attention_split", "(Tensor features, bool channels_last) -> Tensor")
JOIN = cpu_kernel(
    "contextual_attention_join",
    "(Tensor phases, Tensor? more, SymInt height, SymInt width, bool channels_last) -> Tensor",
)
SPREAD = cpu_kernel(
    "contextual_attention_spread",
    "(Tensor correlation, Tensor valid, SymInt height, SymInt width, float scale, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
)
SLOPES = cpu_kernel(
    "contextual_attention_slopes",
    "(Tensor grad, Tensor correlation, Tensor inverse, Tensor weights, SymInt height, SymInt width, float scale)"
    " -> Tensor",
)


def _attend(features: Tensor, valid: Tensor, scale: float, last: bool) -> tuple[Tensor, ...]:
    """Compute the whole function: its result, and F, G, the inverse norms, U and A for the backward."""
    height, width = features.shape[2] // 2, features.shape[3] // 2
    phases = SPLIT(features, last)
    pixels = wide(phases[:, 0])
    correlation = torch.bmm(pixels, pixels.mT) if last else torch.bmm(pixels.mT, pixels)
    spread, weights, inverse = SPREAD(correlation, valid, height, width, scale=scale, dtype=features.dtype)
    maps, shares = phases.flatten(0, 1), spread.flatten(0, 1)
    out = torch.bmm(shares, maps) if last else torch.bmm(maps, shares.mT)
    return JOIN(out.view_as(phases), None, height, width, last), phases, correlation, inverse, spread, weights


def _attend_backward(grad: Tensor, phases: Tensor, *saved: Any) -> Tensor:
    correlation, inverse, spread, weights, scale, last = saved
    height, width = grad.shape[2] // 2, grad.shape[3] // 2
    with without_autocast(grad.device):
        slopes = SPLIT(grad.contiguous(memory_format=torch.channels_last) if last else grad, last).flatten(0, 1)
        maps, shares, pixels = phases.flatten(0, 1), spread.flatten(0, 1), wide(phases[:, 0])
        of_shares = torch.bmm(slopes, maps.mT) if last else torch.bmm(slopes.mT, maps)
        of_maps = torch.bmm(shares.mT, slopes) if last else torch.bmm(slopes, shares)
        by = SLOPES(of_shares.view_as(spread), correlation, inverse, weights, height=height, width=width, scale=scale)
        of_pixels = torch.bmm(by, pixels) if last else torch.bmm(pixels, by)
    return JOIN(of_maps.view_as(phases), of_pixels, height, width, last)


_whole = differentiable(_attend, _attend_backward, lambda inputs, outputs: (*outputs[1:], *inputs[2:]), constants=5)


def contextual_attention(features: Tensor, valid: Tensor, scale: float = 10.0) -> Tensor:
    """Rebuild a feature map from its valid patches, weighted by similarity.

    Args:
        features: ``[B, C, H, W]``, H and W even; float16, bfloat16, float32 or float64. They get a gradient.
        valid: bool ``[B, (H/2) * (W/2)]``, the keys that each sample may use, in row-major order (`key_validity`).
        scale: factor of the scores before the softmax.

    Returns:
        ``[B, C, H, W]``, the features' dtype, also under autocast; contiguous, or channels_last if the features are.
        Scores and softmax are float32 (float64 for float64). The matrix products follow
        ``torch.set_float32_matmul_precision``.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Memory: six [H*W/4, H*W/4] matrices per sample (24 MiB in float32 at 64x64), which a gradient stores until the
    backward. The op has first-order gradients only and is deterministic. A sample's result does not depend on the other
    samples, apart from the rounding of the matrix products.
    """
    check_floating(features=features)
    if features.dim() != 4 or any(side % 2 or side == 0 for side in features.shape[2:]):
        raise ValueError(f"features must be [B, C, H, W] with even H and W, at least 2, got {list(features.shape)}")
    batch, channels, rows, columns = features.shape
    height, width = rows // 2, columns // 2
    check_form("valid", valid, torch.bool, "[B, (H/2) * (W/2)]", (batch, height * width), features=features)

    last, gradient, pairs = last_channels(features), needs_gradient(features), batch * (height * width) ** 2
    plain = OP.uses_reference(features.device, pairs)
    saves = may_save(features) and not plain
    with without_autocast(features.device):
        # The kernels of the whole function are used where the op's kernels would be used, forward and backward.
        if saves and not (gradient and BACKWARD.uses_reference(features.device, pairs)):
            return (_whole if gradient else _attend)(features, valid, float(scale), last)[0]
        # The shape of the grid is [B, C, h, a, w, b]. The indices a and b are those of F_ab.
        grid = features.unflatten(3, (width, 2)).unflatten(2, (height, 2))
        # Each memory layout uses the matrix products that need no transposed copy.
        if last:
            phases = grid.permute(0, 3, 5, 2, 4, 1).reshape(batch, 4, height * width, channels)
        else:
            phases = grid.permute(0, 3, 5, 1, 2, 4).reshape(batch, 4, channels, height * width).mT
        pixels = wide(phases[:, 0])
        correlation = pixels @ pixels.mT
        inverse, keep = _inverse_norms(pixels, height, width), valid.to(features.dtype)
        kernel = _between if gradient else OP.handle
        call = reference if plain else kernel
        spread, _weights = call(correlation, inverse, keep, height, width, float(scale))
        if last:
            out = (spread @ phases).view(batch, 2, 2, height, width, channels)
            return out.permute(0, 3, 1, 4, 2, 5).reshape(batch, rows, columns, channels).permute(0, 3, 1, 2)
        out = (phases.mT @ spread.mT).view(batch, 2, 2, channels, height, width)
        return out.permute(0, 3, 4, 1, 5, 2).reshape(features.shape)


def key_validity(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Find the keys that `contextual_attention` may use: those whose whole 3x3 neighborhood on the key grid is known.

    Args:
        mask: ``[B, 1, H0, W0]``, bool or a number, at any resolution. Nonzero pixels are missing.
        size: (h, w) of the key grid, half of the features' size.

    Returns:
        bool ``[B, h * w]``, row-major. A cell of the grid is missing if any pixel of the mask inside the cell is
        nonzero. The published code reads every eighth pixel, with the same result for 256 px images with blocks of 32
        px. Cells outside the grid do not count as missing. There is no gradient.

    Raises:
        ValueError: mask is not [B, 1, H0, W0] or is empty, or h or w is below 1.
    """
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] < 1 or mask.shape[3] < 1:
        raise ValueError(f"mask must be [B, 1, H0, W0], got {list(mask.shape)}")
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"size must be (h, w) with h and w at least 1, got {tuple(size)}")
    missing = (mask.detach() != 0).to(torch.float32)
    return F.max_pool2d(F.adaptive_max_pool2d(missing, size), 3, 1, 1).flatten(1) == 0
