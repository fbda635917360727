"""Return True if two computations of the same numbers agree up to rounding, in one of three strengths."""

from __future__ import annotations

import torch
from torch import Tensor

#: The strengths: the largest error as a share of the largest value, or of a distance between logits. REPEATED: for the
#: same operations again. FLOAT32: for sums in another order, or with folded layers. BFLOAT16: for products in bfloat16,
#: or by a kernel that the shape of the batch has chosen.
REPEATED, FLOAT32, BFLOAT16 = 1e-5, 1e-3, 0.05
#: The least cosine between two gradients.
COSINE = {FLOAT32: 0.999, BFLOAT16: 0.8}
#: A step may have a cosine to the step in float32 that is smaller by this number than that of the step as written.
AS_EXACT = 0.05
#: The scale of rounding is at most this multiple of the median gap between the two largest logits.
REACH = 8
#: The rounding of the logits themselves in float32, about 16 units, as a share of the median of the largest logits.
SAME_SIZE = 2e-6


def differ(first: Tensor, second: Tensor) -> bool:
    """Return True if two outputs ``[B, classes]`` of a model differ by more than the rounding REPEATED."""
    return first.shape != second.shape or bool(apart(first, second, REPEATED).any())


def apart(first: Tensor, second: Tensor, strength: float) -> Tensor:
    """Tell for which images two outputs ``[B, classes]`` differ in what decides by more than rounding, bool ``[B]``.

    What decides is the distance of each logit from the image's largest finite logit. A distance may differ by a share
    of itself. A small one may differ by a share of the largest distance, or of `REACH` times the median gap between
    the two largest logits. So neither a masked class nor an image with huge logits hides what the others do.
    """
    both = torch.stack([first.detach(), second.detach()]).double()
    leading = both.where(both.isfinite(), -torch.inf).topk(min(2, both.shape[-1]), -1).values
    top, gaps = leading[..., :1].nan_to_num(neginf=0.0), leading[..., 0] - leading[..., -1]
    # An image with a single finite logit, or with two equal largest ones, says nothing about the scale.
    gaps, behind = gaps[(gaps > 0) & gaps.isfinite()], both - top
    reach = REACH * float(gaps.median()) if len(gaps) else torch.inf
    scale = min(reach, float(behind.nan_to_num(0.0, 0.0, 0.0).abs().amax()))
    allowed = strength * scale + SAME_SIZE * float(top.abs().median())
    return ~torch.isclose(behind[0], behind[1], rtol=strength, atol=allowed, equal_nan=True).all(1)


def same_direction(got: Tensor, want: Tensor, strength: float = BFLOAT16) -> bool:
    """Return True if two gradients have nearly the same direction. A gradient of 0 or NaN agrees with any other."""
    size, along = want.norm(), torch.dot(want.flatten(), got.flatten())
    return not 0 < float(size) < torch.inf or bool(along >= COSINE[strength] * size * got.norm())


def nearly_as_exact(got: Tensor, written: Tensor, exact: Tensor, before: Tensor) -> bool:
    """Return True if a compiled step is about as near to the step in float32 as the step as written.

    Args:
        got: a result of the compiled step.
        written: the result of the step as written.
        exact: the result of the step in float32.
        before: the value before the step.
    """
    if got.shape != written.shape or got.dtype != written.dtype:
        return False
    # NaN and infinite numbers, such as the loss of a point that was never judged, must be equal.
    finite = written.isfinite() & exact.isfinite()
    if not torch.allclose(got[~finite], written[~finite], equal_nan=True):
        return False
    start = before[finite].double().nan_to_num(0.0, 0.0, 0.0)
    fast, usual, ideal = (part[finite].double() - start for part in (got, written, exact))
    if written.dim() < 2:
        far, near = ((out - ideal).abs().mean() for out in (fast, usual)) if len(ideal) else (start.sum(), start.sum())
        return bool(far <= near + BFLOAT16 * (ideal + start).abs().amax()) if len(ideal) else True
    far, near = (torch.dot(part, ideal) / (part.norm() * ideal.norm()) for part in (fast, usual))
    return bool(far >= near - AS_EXACT) if bool(ideal.any()) else not bool(fast.any())
