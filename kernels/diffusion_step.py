"""`diffusion_step` in Triton: elementwise kernels that draw the noise, in the backward only for learned variances."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty, empty_like

from ._common import cdiv, clamp, first_of, grid, is_channels_last, load, memory_format, place, program, tile
from ._launch import launch
from .philox import noise

#: The fourth word of Philox's counter: `purify_fast.ops.philox.Stream.DIFFUSION`.
DIFFUSION = 9
#: The number of different indices of a step: `purify_fast.ops.diffusion_step.STEPS`.
STEPS = tl.constexpr(65536)


@triton.jit
def _normals(pointers, row, first, STREAM: tl.constexpr, GROUPS: tl.constexpr, PAIRS: tl.constexpr):
    """Draw normal numbers for the elements of this program. ``first`` is the index of its first group of four."""
    seed_ptr, ids_ptr, draws_ptr, step_ptr = pointers
    draw = tl.load(draws_ptr + row) * STEPS + tl.load(step_ptr)
    return noise(
        tl.load(seed_ptr), first, draw, sample=tl.load(ids_ptr + row), stream=STREAM, GROUPS=GROUPS, PAIRS=PAIRS
    )


@triton.jit
def _deviation(v, s, lo, hi):
    share = 0.5 * (v + 1.0)
    return s * tl.exp(0.5 * (share * hi + (1.0 - share) * lo))


@triton.jit
def _forward(
    x_ptr,  # [rows, size]
    m_ptr,  # [rows, channels, plane], channels last if CHANNELS_LAST
    k_ptr,  # [8] if stride is 0, else [rows, 8]
    seed_ptr,  # [1], int64
    ids_ptr,  # [rows], int64
    draws_ptr,  # [rows], int64
    step_ptr,  # [1], int64
    out_ptr,  # [rows, size]
    rows,
    size,
    plane,
    channels,
    stride,
    LEARNED: tl.constexpr,
    NOISY: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    STREAM: tl.constexpr,
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A program writes some elements of the next state of one sample."""
    # k3 clamp(k0 x + k1 m, -c, c) + k4 x + s z; s is that of v if LEARNED.
    row, block = program(rows)
    image, first = row.to(tl.int64), first_of(block, size, GROUPS * 4)
    element = first + tl.arange(0, GROUPS * 4)
    inside = element < size
    at = place(element, plane, channels, CHANNELS_LAST)
    # The distance from an element's m to its v (see the op).
    behind = tl.cast(channels // 2 if CHANNELS_LAST else size, element.dtype)
    begin = image * size
    x = load(x_ptr + begin, element, inside)
    m_ptr += begin * 2 if LEARNED else begin
    m = load(m_ptr, at, inside)
    k_ptr += image * stride
    c = tl.load(k_ptr + 2)
    clipped = clamp(tl.load(k_ptr) * x + tl.load(k_ptr + 1) * m, -c, c)
    out = tl.load(k_ptr + 3) * clipped + tl.load(k_ptr + 4) * x
    if NOISY:
        s = tl.load(k_ptr + 5)
        if s != 0:
            pointers, group = (seed_ptr, ids_ptr, draws_ptr, step_ptr), first_of(block, size, GROUPS)
            z = _normals(pointers, image, group, STREAM=STREAM, GROUPS=GROUPS, PAIRS=PAIRS)
            if LEARNED:
                out += _deviation(load(m_ptr, at + behind, inside), s, tl.load(k_ptr + 6), tl.load(k_ptr + 7)) * z
            else:
                out += s * z
    tl.store(out_ptr + begin + element, out, mask=inside)


@triton.jit
def _backward(
    grad_ptr,  # [rows, size]
    x_ptr,  # [rows, size]
    m_ptr,  # [rows, channels, plane], channels last if CHANNELS_LAST
    k_ptr,  # [8] if stride is 0, else [rows, 8]
    seed_ptr,  # [1], int64
    ids_ptr,  # [rows], int64
    draws_ptr,  # [rows], int64
    step_ptr,  # [1], int64
    dx_ptr,  # [rows, size]
    dm_ptr,  # [rows, channels, plane], channels last if CHANNELS_LAST
    rows,
    size,
    plane,
    channels,
    stride,
    LEARNED: tl.constexpr,
    NOISY: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    STREAM: tl.constexpr,
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A program writes some elements of the gradients of x and of the prediction of one sample."""
    # dx = k0 k3 g + k4 g, dm = k1 k3 g, without the terms of k3 where the clamp is active; dv = g z ds/dv.
    row, block = program(rows)
    image, first = row.to(tl.int64), first_of(block, size, GROUPS * 4)
    element = first + tl.arange(0, GROUPS * 4)
    inside = element < size
    at = place(element, plane, channels, CHANNELS_LAST)
    # The distance from an element's m to its v (see the op).
    behind = tl.cast(channels // 2 if CHANNELS_LAST else size, element.dtype)
    begin = image * size
    grad, x = load(grad_ptr + begin, element, inside), load(x_ptr + begin, element, inside)
    of_prediction = begin * 2 if LEARNED else begin
    m = load(m_ptr + of_prediction, at, inside)
    dm_ptr += of_prediction
    k_ptr += image * stride
    p, q, c = tl.load(k_ptr), tl.load(k_ptr + 1), tl.load(k_ptr + 2)
    u = p * x + q * m
    through = tl.where((u >= -c) & (u <= c), tl.load(k_ptr + 3) * grad, 0.0)
    tl.store(dx_ptr + begin + element, p * through + tl.load(k_ptr + 4) * grad, mask=inside)
    tl.store(dm_ptr + at, (q * through).to(dm_ptr.dtype.element_ty), mask=inside)
    if LEARNED:
        dv = tl.zeros_like(x)
        if NOISY:
            s = tl.load(k_ptr + 5)
            if s != 0:
                lo, hi = tl.load(k_ptr + 6), tl.load(k_ptr + 7)
                v = load(m_ptr + of_prediction, at + behind, inside)
                pointers, group = (seed_ptr, ids_ptr, draws_ptr, step_ptr), first_of(block, size, GROUPS)
                z = _normals(pointers, image, group, STREAM=STREAM, GROUPS=GROUPS, PAIRS=PAIRS)
                dv = grad * z * (0.25 * (hi - lo) * _deviation(v, s, lo, hi))
        tl.store(dm_ptr + at + behind, dv.to(dm_ptr.dtype.element_ty), mask=inside)


def _launch(kernel, images: tuple[Tensor, ...], named: tuple[Tensor, ...], results: tuple[Tensor, ...], noisy) -> None:
    """Launch a kernel.

    ``images`` are in the order of the kernel's arguments, with x and the prediction last. ``named`` are the
    coefficients, seed, sample_ids, draws and step.
    """
    *_, x, prediction = images
    rows, last, channels = x.shape[0], is_channels_last(prediction), prediction.shape[1]
    size = x.numel() // rows
    # A thread reads single numbers of a channels_last prediction, but whole vectors of the state.
    block, warps = tile(size, x) if last else tile(size, x, prediction)
    coefficients, *others = (one.contiguous() for one in named)
    tensors = [*(one.contiguous() for one in images[:-1]), prediction if last else prediction.contiguous()]
    stride = coefficients.shape[-1] if coefficients.dim() == 2 else 0
    given = *tensors, coefficients, *others, *results, rows, size, size // x.shape[1], channels, stride
    kind = {"LEARNED": channels > x.shape[1], "NOISY": noisy, "CHANNELS_LAST": last, "STREAM": DIFFUSION}
    pairs = prediction.element_size() == 2 and not last
    shape = {"GROUPS": block // 4, "PAIRS": pairs, "num_warps": warps}
    launch(kernel, grid(rows, cdiv(size, block)), *given, **kind, **shape, enable_fp_fusion=False)


def forward(x: Tensor, prediction: Tensor, *named) -> Tensor:
    """Return the next state. ``named`` are coefficients, seed, sample_ids, draws, step, and whether there is noise."""
    out = empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        _launch(_forward, (x, prediction), named[:-1], (out,), noisy=named[-1])
    return out


def backward(grad: Tensor, x: Tensor, prediction: Tensor, *named) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the prediction, the latter in the prediction's dtype and memory format."""
    to_x = empty(x.shape, dtype=x.dtype, device=x.device)
    to_prediction = empty_like(prediction, memory_format=memory_format(is_channels_last(prediction)))
    if to_x.numel():
        _launch(_backward, (grad, x, prediction), named[:-1], (to_x, to_prediction), noisy=named[-1])
    return to_x, to_prediction
