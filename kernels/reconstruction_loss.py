"""`reconstruction_loss` in Triton: a program sums one chunk of one sample. A second kernel adds the chunks in order.

The chunk has a fixed size and there are no atomics, so the loss of a sample has the same bits in every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import CHUNK, cdiv, dense, log1p, sum_tile, tile
from ._launch import launch


@triton.jit(do_not_specialize=["chunks"])
def _forward(logits_ptr, target_ptr, out_ptr, size, chunks, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    """A program sums one chunk of one sample."""
    # max(l, 0) - l t + log(1 + exp(-|l|)), summed.
    # logits_ptr, target_ptr: [B, size]; out_ptr: [B, chunks], float32
    pid = tl.program_id(0).to(tl.int64)
    row, chunk = pid // chunks, pid % chunks
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, LENGTH, WIDTH):
        element = chunk * LENGTH + first + tl.arange(0, WIDTH)
        inside = element < size
        x = tl.load(logits_ptr + row * size + element, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(target_ptr + row * size + element, mask=inside, other=0.0).to(tl.float32)
        # (1 - t) x + log(1 + exp(-x)), in a form that is accurate for large and small x.
        loss = (1.0 - t) * x + log1p(tl.exp(-tl.abs(x))) + tl.maximum(-x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        total += tl.where(inside, loss, 0.0)
    tl.store(out_ptr + pid, tl.sum(total, 0))


@triton.jit(do_not_specialize=["chunks"])
def _add(parts_ptr, out_ptr, chunks, WIDTH: tl.constexpr):
    """A program adds the chunks of one sample, in order."""
    # parts_ptr: [B, chunks], float32; out_ptr: [B], float32
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, chunks, WIDTH):
        element = first + tl.arange(0, WIDTH)
        total += tl.load(parts_ptr + row * chunks + element, mask=element < chunks, other=0.0)
    tl.store(out_ptr + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=["blocks"])
def _backward(grad_ptr, logits_ptr, target_ptr, out_ptr, size, blocks, WIDTH: tl.constexpr):
    """A program writes some elements of the gradient of one sample."""
    # g (sigmoid(l) - t).
    # grad_ptr: [B]; logits_ptr, target_ptr, out_ptr: [B, size]
    pid = tl.program_id(0).to(tl.int64)
    row, element = pid // blocks, pid % blocks * WIDTH + tl.arange(0, WIDTH)
    inside = element < size
    g = tl.load(grad_ptr + row).to(tl.float32)
    x = tl.load(logits_ptr + row * size + element, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(target_ptr + row * size + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + element, (g * (tl.sigmoid(x) - t)).to(out_ptr.dtype.element_ty), mask=inside)


def forward(logits: Tensor, target: Tensor) -> Tensor:
    """Map logits and target [B, ...] to the loss [B], float32."""
    batch, out = logits.shape[0], torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.numel() == 0:
        return out.zero_()
    size = logits.numel() // batch
    (width, warps), chunks = sum_tile(size), cdiv(size, CHUNK)
    length = CHUNK if chunks > 1 else cdiv(size, width) * width
    parts = torch.empty((batch, chunks), dtype=torch.float32, device=logits.device) if chunks > 1 else out
    given = dense(logits), dense(target), parts, size, chunks
    launch(_forward, (batch * chunks,), *given, LENGTH=length, WIDTH=width, num_warps=warps, enable_fp_fusion=True)
    if chunks > 1:
        launch(_add, (batch,), parts, out, chunks, WIDTH=128, num_warps=1, enable_fp_fusion=True)
    return out


def backward(grad: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Return grad [B] times dloss/dlogits, contiguous, in the shape and dtype of the logits."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.numel() == 0:
        return out
    size = logits.numel() // logits.shape[0]
    width, warps = tile(size, logits, target)
    blocks = cdiv(size, width)
    given = grad.contiguous(), logits.contiguous(), target.contiguous(), out, size, blocks
    launch(_backward, (logits.shape[0] * blocks,), *given, WIDTH=width, num_warps=warps, enable_fp_fusion=True)
    return out
