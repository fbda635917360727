"""Return True if two computations of the same numbers agree up to rounding, in one of three strengths."""

from __future__ import annotations

import torch
from torch import Tensor

#: The strengths: the largest error as a share of the largest value or of the spread of an image's logits. REPEATED: for
#: the same operations again. FLOAT32: for sums in another order, or with folded layers. BFLOAT16: for products in
#: bfloat16, or by a kernel that the shape of the batch has chosen.
REPEATED, FLOAT32, BFLOAT16 = 1e-5, 1e-3, 0.05
#: The least cosine between two gradients.
COSINE = {FLOAT32: 0.999, BFLOAT16: 0.8}
#: A step may have a cosine to the step in float32 that is smaller by this number than that of the step as written.
AS_EXACT = 0.05
#: The rounding of the logits themselves in float32, about 16 units, as a share of the largest absolute logit.
SAME_SIZE = 2e-6


def differ(first: Tensor, second: Tensor) -> bool:
    """Return True if two outputs ``[B, classes]`` of a model differ by more than the rounding REPEATED."""
    return first.shape != second.shape or bool(apart(first, second, REPEATED, together=True).any())


def apart(one: Tensor, other: Tensor, strength: float, together: bool = False) -> Tensor:
    """Tell which images have logits that differ by more than rounding, bool ``[B]``.

    ``together``: the largest spread and size of all images count for each of them.
    """
    one, other = one.double(), other.double()
    same, finite = (one == other) | (one.isnan() & other.isnan()), one.isfinite()
    spread = (one.where(finite, -torch.inf).amax(1) - one.where(finite, torch.inf).amin(1)).clamp(min=0)
    size = one.where(finite, 0.0).abs().amax(1)
    spread, size = (spread.max(), size.max()) if together else (spread, size)
    return (~same & ~((one - other).abs() <= (strength * spread + SAME_SIZE * size).view(-1, 1))).any(1)


def same_direction(got: Tensor, want: Tensor, strength: float = BFLOAT16) -> bool:
    """Return True if two gradients have nearly the same direction. A gradient of 0 or NaN agrees with any other."""
    size = want.norm()
    counts = bool(size.isfinite()) and bool(size > 0)
    return not counts or bool(torch.dot(want.flatten(), got.flatten()) >= COSINE[strength] * size * got.norm())


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
    made, usual, ideal = (one[finite].double() - start for one in (got, written, exact))
    if written.dim() < 2:
        far, near = ((one - ideal).abs().mean() for one in (made, usual)) if len(ideal) else (start.sum(), start.sum())
        return bool(far <= near + BFLOAT16 * (ideal + start).abs().amax()) if len(ideal) else True
    if not bool(ideal.any()):
        return not bool(made.any())
    far, near = (torch.dot(one, ideal) / (one.norm() * ideal.norm()) for one in (made, usual))
    return bool(far >= near - AS_EXACT)
