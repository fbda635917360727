"""Whether a variant of a random model is what its name promises, found out before anything attacks it.

An attack looks for images under one draw of the noise, and `evaluate` judges them under the same draw. Both mean
something only if the draw is the same in every call, for every place in a batch and for every split of the batch.
Otherwise the number measures how often the draw changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attacks.attacked_model import SAME_SIZE
from ..protocols import Classifier

#: By how much of an image's spread (largest minus smallest logit) its logits may differ through rounding: between
#: batches of one shape, and between batches of different shapes, for which libraries choose other algorithms.
SAME_SHAPE, OTHER_SHAPE = 0.01, 0.05
#: The share of the images that may differ by more: an image at the edge of a rounding step tells nothing of the noise.
FEW = 0.25


@dataclass(frozen=True)
class Fault:
    """Why a variant cannot be attacked.

    Args:
        reason: what is wrong and what to do about it, in a sentence.
        repeats: whether one and the same call gives the same logits again, so that only the batch matters.
    """

    reason: str
    repeats: bool


@dataclass(frozen=True)
class Advice:
    """What a user can do about the faults of a variant.

    Args:
        call: how the variant is entered.
        calls: where two calls in one block differ.
        blocks: where two blocks of the same seed differ.
        batch: where an image's logits depend on the batch.
    """

    call: str
    calls: str
    blocks: str
    batch: str


FIXED_NOISE = Advice(
    "fixed_noise(seed)",
    calls="start the generator from the seed in every call, not once when the block begins",
    blocks="make the noise from the seed alone",
    batch="give every image the same noise, for example torch.randn(x.shape[1:], generator=generator)",
)
DETERMINISTIC = Advice(
    "deterministic()",
    calls="turn off everything that is drawn",
    blocks="turn off everything that is drawn",
    batch="let the logits of an image depend on that image alone",
)


def find_fault(
    model: Classifier, x: Tensor, block: Callable[[], contextlib.AbstractContextManager[Any]], advice: Advice
) -> Fault | None:
    """Compare the predictions of a variant: twice, in a second block, in another order, and in parts.

    Args:
        model: images to logits ``[B, classes]``.
        x: a few images ``[B, C, H, W]``, on the model's device.
        block: enters the variant, always with the same seed.
        advice: how the variant is called, and what to do about each fault.

    Returns:
        The first fault; None where there is none.
    """
    # the places of a single image can be told apart too
    x = x if len(x) > 1 else torch.cat([x, x])
    with block():
        first, again = model(x), model(x)
        moved = model(x.roll(1, 0)).roll(-1, 0)
        parts = torch.cat([model(x[:1]), model(x[1:])])
    with block():
        anew = model(x)
    for what, other, tolerance, what_to_do in (
        ("two calls give different logits", again, SAME_SHAPE, advice.calls),
        ("the logits differ when the block is entered again", anew, SAME_SHAPE, advice.blocks),
        ("the logits of an image depend on its place in the batch", moved, SAME_SHAPE, advice.batch),
        ("the logits of an image depend on how the batch is split", parts, OTHER_SHAPE, advice.batch),
    ):
        count = int(_apart(first, other, tolerance).sum())
        if count > FEW * len(x):
            reason = (
                f"within a block of {advice.call}, {what} (of {count} of {len(x)} images by more than "
                f"{100 * tolerance:.0f} % of their spread), so its number would mean nothing: {what_to_do}"
            )
            return Fault(reason, repeats=other is not again)
    return None


def _apart(one: Tensor, other: Tensor, tolerance: float) -> Tensor:
    """Which images have logits that differ by more than rounding explains, bool ``[B]``."""
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    finite = one.isfinite()
    spread = one.where(finite, -torch.inf).amax(1) - one.where(finite, torch.inf).amin(1)
    size = one.where(finite, 0.0).abs().amax(1)
    allowed = tolerance * spread.clamp(min=0) + SAME_SIZE * size
    return (~same & ~((one - other).abs() <= allowed[:, None])).any(1)
