"""Compare a fast copy of a model with the model itself, by their logits and their input gradients."""

from __future__ import annotations

import torch
from torch import Tensor

#: The limit for errors in a copy's logits. The gap of a class is the logit of the predicted class minus the logit of
#: this class. The copy's gap may differ from the model's gap by this share of the model's gap. If the model's gap is
#: small, the limit is this share of the median gap of the class with the fourth highest logit (see `same_logits`).
TOLERANCE = 0.1
#: A copy is used only if the cosine between its input gradient and its model's input gradient is at least this number.
LEAST_COSINE = 0.8


def same_logits(got: Tensor, want: Tensor) -> bool:
    """Tell whether a copy has the logits ``[B, classes]`` of its model, up to a constant for each image."""
    if want.shape != got.shape or not bool(got.isfinite().all()):
        return False
    # Measure the gap from the first to the fourth class, because targeted DLR reads the four highest logits. With fewer
    # than nine classes, measure to an earlier class, because the smallest logit may be far from all others.
    leading = want.topk(min(4, 2 + (want.shape[1] - 1) // 4), 1).values
    top = want.argmax(1, keepdim=True)
    behind, its_own = (logits.gather(1, top) - logits for logits in (want, got))
    # Each class has its own limit: a class with a very low logit would allow large errors in all others.
    allowed = TOLERANCE * behind.clamp_min((leading[:, 0] - leading[:, -1]).median())
    return bool(((its_own - behind).abs() <= allowed).all())


def same_direction(got: Tensor, want: Tensor, cosine: float = LEAST_COSINE) -> bool:
    """Tell whether two gradients have nearly the same direction. A gradient of 0 or NaN agrees with any other."""
    size = want.norm()
    if not (bool(size.isfinite()) and bool(size > 0)):
        return True
    return bool(torch.dot(want.flatten(), got.flatten()) >= cosine * size * got.norm())
