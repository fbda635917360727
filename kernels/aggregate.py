"""`aggregate` in Triton: a tile has all K samples and some classes of one image.

lse, mean and mean_sigmoid treat each class separately, so they use one program per image and tile. If the images are
small, a tile has the classes of several images, because a GPU starts less than two programs per nanosecond: with 8
samples of 10 classes, this would be the limit. peel and vote compare classes, so they use one program per image, which
processes the classes in two loops. peel computes each tile in both loops, because this is cheaper than writing the
tiles in the first loop and reading them in the second.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import KEPT, cdiv, grid, log1p, next_power_of_2, program, warps
from ._launch import launch

#: The number of elements in a tile. A tile is larger only if there are more samples than this.
TILE = 4096
#: The number of elements up to which a tile has several images.
SHARED = 1024
#: The indices of the methods in `purify_fast.ops.aggregate.METHODS`, and the constant TANGENT of the same file.
LSE, PEEL, MEAN, MEAN_SIGMOID, VOTE = (tl.constexpr(index) for index in range(5))
TANGENT = tl.constexpr(70.0)


@triton.jit
def _tile(logits_ptr, row, first, samples, classes, other, K: tl.constexpr, C: tl.constexpr):
    """Return the tile of an image whose first class is ``first``, float32 [K, C], and which elements exist."""
    # logits_ptr: [batch, samples, classes]
    k, c = tl.arange(0, K), first + tl.arange(0, C)
    inside = (k < samples)[:, None] & (c < classes)[None, :]
    at = row * samples * classes + k[:, None].to(tl.int64) * classes + c[None, :]
    return tl.load(logits_ptr + at, mask=inside, other=other).to(tl.float32), inside


@triton.jit
def _columns_of(batch, samples, classes, K: tl.constexpr, C: tl.constexpr, IMAGES: tl.constexpr):
    """Return the elements of this program, which has some classes of one image, or all classes of ``IMAGES`` images.

    Returns the index of the first image; the offsets of the elements among the logits of these images, and which exist;
    and for each column its offset among the results of these images, and whether it exists. The elements are [K, C] for
    one image. For several images they are [K * C], so that adjacent threads read adjacent numbers: the compilers of
    some versions arrange the threads of [K, C] along the samples if the rows are not aligned.
    """
    row, block = program((batch + IMAGES - 1) // IMAGES)
    first, column = row.to(tl.int64) * IMAGES, tl.arange(0, C)
    if IMAGES == 1:
        column, k = block * C + column, tl.arange(0, K)
        exists = column < classes
        at, inside = k[:, None].to(tl.int64) * classes + column[None, :], (k < samples)[:, None] & exists[None, :]
    else:
        element = tl.arange(0, K * C)
        k = element // C
        image, inside = _image(element - k * C, first, batch, classes, IMAGES)
        at, inside = k * classes + (element - k * C) + image * (samples - 1) * classes, inside & (k < samples)
        exists = _image(column, first, batch, classes, IMAGES)[1]
    return first, at, inside, column, exists


@triton.jit
def _image(column, first, batch, classes, IMAGES: tl.constexpr):
    """Return which of a program's images each column belongs to, and whether there is such an image."""
    image = (column.to(tl.uint32) // tl.cast(classes, tl.uint32)).to(tl.int32)
    return image, (image < IMAGES) & (first + image < batch)


@triton.jit
def _logsumexp(x):
    """Return logsumexp over axis 0, with torch.logsumexp's result for NaN and infinities. Unused rows must be -inf."""
    high = tl.max(x, 0)
    high = tl.where(tl.abs(high) == float("inf"), 0.0, high)
    return tl.log(tl.sum(tl.exp(x - high[None, :]), 0)) + high


@triton.jit
def _softmax(x, inside):
    """Return softmax over axis 0. Beside +inf it is 0, as the gradient of torch.logsumexp. At +inf it is NaN."""
    high = tl.max(x, 0)
    e = tl.where(inside, tl.exp(x - high[None, :]), 0.0)
    return e / tl.where(high == float("inf"), 1.0, tl.sum(e, 0))[None, :]


@triton.jit
def _odds(x, inside):
    """Compute the terms of the odds of mean(sigmoid(x)) over axis 0. Unused rows must be +inf.

    With t = exp(-|x|), sigmoid(|x|) is 1 / (1 + t) and sigmoid(-|x|) is t / (1 + t). If all numbers of a column have
    the same sign, the sum of the t / (1 + t) could underflow. So its terms are multiplied by exp(|shift|), where
    |shift| is the least |x|, and shift has the sign of x. In three cases, shift is 0: the signs differ, the least |x|
    is at most 1, or the least |x| is infinite.

    Returns t exp(|shift|) and 1 / (1 + t), [K, C]; the sums of sigmoid(x) and of sigmoid(-x), [C], where the sum of the
    t / (1 + t) has the factor exp(|shift|); shift; and exp(-|shift|).
    """
    low, high = tl.min(x, 0), tl.max(tl.where(inside, x, float("-inf")), 0)
    shift = tl.maximum(low, 0.0) + tl.minimum(high, 0.0)
    shift = tl.where((tl.abs(shift) > 1.0) & (tl.abs(shift) < float("inf")), shift, 0.0)
    tail = tl.exp(tl.abs(shift)[None, :] - tl.abs(x))
    least = tl.exp(-tl.abs(shift))
    most = tl.where(inside, 1.0 / (1.0 + tail * least[None, :]), 0.0)
    rest = tail * most
    yes, no = tl.sum(tl.where(x > 0, most, rest), 0), tl.sum(tl.where(x > 0, rest, most), 0)
    return tail, most, yes, no, shift, least


@triton.jit
def _tangent_exp(q):
    """Return exp(q), continued along its tangent above TANGENT, and its slope."""
    slope = tl.exp(tl.minimum(q, TANGENT, propagate_nan=tl.PropagateNan.ALL))
    return slope * (1.0 + tl.maximum(q - TANGENT, 0.0, propagate_nan=tl.PropagateNan.ALL)), slope


@triton.jit(do_not_specialize=["batch", "samples"])
def _columns(
    logits_ptr,  # [batch, samples, classes]
    out_ptr,  # [batch, classes], float32
    batch,
    samples,
    classes,
    METHOD: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """A program writes the results of some classes of one image, or of all classes of several images."""
    # lse: logsumexp_k l_k.  mean: mean_k l_k.  mean_sigmoid: logit(mean_k sigmoid(l_k)), by the odds of `_odds`.
    first, at, inside, place, exists = _columns_of(batch, samples, classes, K=K, C=C, IMAGES=IMAGES)
    other = float("-inf") if METHOD == LSE else 0.0 if METHOD == MEAN else float("inf")
    x = tl.load(logits_ptr + first * samples * classes + at, mask=inside, other=other).to(tl.float32)
    x, inside = tl.reshape(x, [K, C]), tl.reshape(inside, [K, C])
    if METHOD == LSE:
        out = _logsumexp(x)
    elif METHOD == MEAN:
        out = tl.sum(x, 0) / samples
    else:
        tail, most, yes, no, shift, _least = _odds(x, inside)
        # If the odds are nearly even, the logarithm depends on the small difference of the two sums. So this line adds
        # up the differences of their terms, which loses fewer digits.
        excess = tl.sum(tl.where(x > 0, most - tail * most, tail * most - most), 0)
        more = tl.where(shift == 0.0, tl.abs(excess) / tl.minimum(yes, no), yes / no - 1.0)
        out = tl.where(more == float("inf"), more, log1p(more))
        out = tl.where((shift == 0.0) & (excess < 0), -out, out) + shift
    tl.store(out_ptr + first * classes + place, out, mask=exists)


@triton.jit(do_not_specialize=["batch", "samples"])
def _columns_backward(
    grad_ptr,  # [batch, classes]
    logits_ptr,  # [batch, samples, classes]
    out_ptr,  # [batch, samples, classes]
    batch,
    samples,
    classes,
    METHOD: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """A program writes the gradients of all samples for the classes of `_columns`."""
    # lse: g softmax_k(l).  mean: g / samples.  mean_sigmoid: see below.
    first, at, inside, place, exists = _columns_of(batch, samples, classes, K=K, C=C, IMAGES=IMAGES)
    g = tl.load(grad_ptr + first * classes + place, mask=exists, other=0.0).to(tl.float32)
    own = first * samples * classes
    if METHOD == MEAN:
        out = tl.zeros((K, C), tl.float32) + (g / samples)[None, :]
    elif METHOD == LSE:
        x = tl.reshape(tl.load(logits_ptr + own + at, mask=inside, other=float("-inf")).to(tl.float32), [K, C])
        out = _softmax(x, tl.reshape(inside, [K, C])) * g[None, :]
    else:
        x = tl.reshape(tl.load(logits_ptr + own + at, mask=inside, other=float("inf")).to(tl.float32), [K, C])
        # The slope is sigmoid(x) sigmoid(-x) (1 / yes + 1 / no), where yes is the sum of sigmoid(x), and no the sum of
        # sigmoid(-x). In the results of `_odds`, `tail` and the smaller of the two sums have the factor exp(|shift|).
        tail, most, yes, no, shift, least = _odds(x, tl.reshape(inside, [K, C]))
        small, large = tl.where(shift < 0, yes, no), tl.where(shift < 0, no, yes)
        out = tail * most * most * (g * (1.0 / small + least / large))[None, :]
    tl.store(out_ptr + own + at, tl.reshape(out, at.shape).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _peel_normaliser(logits_ptr, row, samples, classes, K: tl.constexpr, C: tl.constexpr):
    """Return the maximum of S over all classes, and the sum of exp(S - maximum). A softmax over the classes needs both.

    S is `_tangent_exp` of the logsumexp of a class over the samples. Each lane computes the two numbers for its
    classes, and the numbers of all lanes are combined at the end.
    """
    # logits_ptr: [batch, samples, classes]
    high = tl.full((C,), float("-inf"), tl.float32)
    total = tl.zeros((C,), tl.float32)
    for first in range(0, classes, C):
        x, _inside = _tile(logits_ptr, row, first, samples=samples, classes=classes, other=float("-inf"), K=K, C=C)
        s, _slope = _tangent_exp(_logsumexp(x))
        valid = first + tl.arange(0, C) < classes
        # S is at least 0, so 0 is a safe start for the running maximum of every lane in use.
        new = tl.where(valid, tl.maximum(tl.maximum(high, 0.0), s), high)
        total = tl.where(valid, total * tl.exp(high - new) + tl.exp(s - new), total)
        high = new
    top = tl.max(high, 0)
    return top, tl.sum(total * tl.exp(high - top), 0)


@triton.jit(do_not_specialize=["samples"])
def _peel(logits_ptr, out_ptr, samples, classes, K: tl.constexpr, C: tl.constexpr):
    """A program writes the log-probabilities of all classes of one image."""
    # S - logsumexp_j S_j, S = exp(logsumexp_k l_k), continued along its tangent.
    # logits_ptr: [batch, samples, classes]; out_ptr: [batch, classes], float32
    row = tl.program_id(0).to(tl.int64)
    top, total = _peel_normaliser(logits_ptr, row, samples, classes=classes, K=K, C=C)
    for first in range(0, classes, C):
        x, _inside = _tile(logits_ptr, row, first, samples=samples, classes=classes, other=float("-inf"), K=K, C=C)
        s, _slope = _tangent_exp(_logsumexp(x))
        c = first + tl.arange(0, C)
        tl.store(out_ptr + row * classes + c, (s - top) - tl.log(total), mask=c < classes)


@triton.jit(do_not_specialize=["samples"])
def _peel_backward(grad_ptr, logits_ptr, out_ptr, samples, classes, K: tl.constexpr, C: tl.constexpr):
    """A program writes the gradients of all samples and classes of one image."""
    # (g - softmax(S) sum_j g_j) dS/dq softmax_k(l), q = logsumexp_k l_k.
    # grad_ptr: [batch, classes]; logits_ptr, out_ptr: [batch, samples, classes]
    row = tl.program_id(0).to(tl.int64)
    top, total = _peel_normaliser(logits_ptr, row, samples, classes=classes, K=K, C=C)
    gradients = tl.zeros((C,), tl.float32)
    for first in range(0, classes, C):
        c = first + tl.arange(0, C)
        gradients += tl.load(grad_ptr + row * classes + c, mask=c < classes, other=0.0).to(tl.float32)
    all_gradients = tl.sum(gradients, 0)
    for first in range(0, classes, C):
        x, inside = _tile(logits_ptr, row, first, samples=samples, classes=classes, other=float("-inf"), K=K, C=C)
        s, slope = _tangent_exp(_logsumexp(x))
        c = first + tl.arange(0, C)
        g = tl.load(grad_ptr + row * classes + c, mask=c < classes, other=0.0).to(tl.float32)
        g = (g - tl.exp(s - top) / total * all_gradients) * slope
        at = row * samples * classes + tl.arange(0, K)[:, None].to(tl.int64) * classes + c[None, :]
        tl.store(out_ptr + at, (_softmax(x, inside) * g[None, :]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["samples"])
def _vote(logits_ptr, out_ptr, samples, classes, K: tl.constexpr, C: tl.constexpr):
    """A program counts, for one image, the samples whose largest logit is that of each class."""
    # logits_ptr: [batch, samples, classes]; out_ptr: [batch, classes], float32
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((K,), float("-inf"), tl.float32)
    index = tl.zeros((K,), tl.int32)
    first_nan = tl.zeros((K,), tl.int32) + classes
    for first in range(0, classes, C):
        x, inside = _tile(logits_ptr, row, first, samples=samples, classes=classes, other=float("-inf"), K=K, C=C)
        c = (first + tl.arange(0, C))[None, :]
        nan = x != x
        x = tl.where(nan, float("-inf"), x)
        high = tl.max(x, 1)
        # Among classes with equal logits, the first one wins, like in argmax.
        where = tl.min(tl.where((x == high[:, None]) & inside, c, classes), 1)
        index = tl.where(high > best, where, index)
        best = tl.maximum(best, high)
        # argmax treats NaN as the largest number.
        first_nan = tl.minimum(first_nan, tl.min(tl.where(nan, c, classes), 1))
    index = tl.where(first_nan < classes, first_nan, index)
    counts = tl.arange(0, K) < samples
    for first in range(0, classes, C):
        c = first + tl.arange(0, C)
        votes = (index[:, None] == c[None, :]) & counts[:, None]
        tl.store(out_ptr + row * classes + c, tl.sum(votes.to(tl.float32), 0), mask=c < classes)


@functools.lru_cache(KEPT)
def _shape(samples: int, classes: int) -> dict[str, int]:
    """Return K and C of a tile, and the number of warps. They do not depend on the batch size."""
    k = next_power_of_2(samples)
    c = min(next_power_of_2(classes), max(TILE // k, 1))
    return {"K": k, "C": c, "num_warps": warps(k * c)}


@functools.lru_cache(KEPT)
def _columns_shape(batch: int, samples: int, classes: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the launch grid of a kernel that treats each class separately, its tile and the compiler's options.

    The tile is the same for every batch size.
    """
    shape: dict[str, Any] = _shape(samples, classes) | {"enable_fp_fusion": True}
    images = SHARED // shape["K"] // classes
    if images > 1:
        c = next_power_of_2(images * classes)
        shape |= {"C": c, "num_warps": warps(shape["K"] * c)}
    shape["IMAGES"] = max(images, 1)
    return grid(cdiv(batch, shape["IMAGES"]), cdiv(classes, shape["C"])), shape


def forward(logits: Tensor, method: int) -> Tensor:
    """Map [B, K, C] to [B, C], float32."""
    batch, samples, classes = logits.shape
    out = torch.empty((batch, classes), dtype=torch.float32, device=logits.device)
    if batch == 0:
        return out
    x = logits.contiguous()
    if method == PEEL.value:
        # In `_peel`, s is a product. If the product were fused with the subtraction in `s - top`, the result for
        # the largest s would be the rounding error of s, and not 0.
        launch(_peel, (batch,), x, out, samples, classes, **_shape(samples, classes), enable_fp_fusion=False)
    elif method == VOTE.value:
        launch(_vote, (batch,), x, out, samples, classes, **_shape(samples, classes), enable_fp_fusion=True)
    else:
        programs, shape = _columns_shape(batch, samples, classes)
        launch(_columns, programs, x, out, batch, samples, classes, METHOD=method, **shape)
    return out


def backward(grad: Tensor, logits: Tensor, method: int) -> Tensor:
    """Return grad [B, C] times the Jacobian, [B, K, C], in the dtype of the logits."""
    batch, samples, classes = logits.shape
    if method == VOTE.value:
        return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if batch == 0:
        return out
    g, x = grad.contiguous(), logits.contiguous()
    if method == PEEL.value:
        launch(
            _peel_backward, (batch,), g, x, out, samples, classes, **_shape(samples, classes), enable_fp_fusion=False
        )
    else:
        programs, shape = _columns_shape(batch, samples, classes)
        launch(_columns_backward, programs, g, x, out, batch, samples, classes, METHOD=method, **shape)
    return out
