"""Tests whether a random model draws once for all images of a call."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .._tensors import repeat_batch
from ..protocols import Classifier, CountsImages, Passes, draws_for_each_image, supports
from ..speed.agreement import differ
from .attacked_model import logits_of_draws

#: `drawn_once_per_call` tests a model on TRIED_IMAGES images. A call has a batch of at most TRIED_ROWS rows, which
#: contains each image several times. At least TRIED_CALLS calls make at least FEWEST_DRAWS draws. A model that picks
#: one of two networks in each call picks the same network in TRIED_CALLS calls with the probability 1/128.
TRIED_IMAGES, TRIED_ROWS, TRIED_CALLS, FEWEST_DRAWS = 2, 8, 8, 64
#: Draws of a call are taken as equal if they differ by less than this share of the difference between two calls.
ALIKE = 0.01


@torch.no_grad()
def drawn_once_per_call(model: Classifier, x: Tensor, draws: int, most: int | None = None) -> bool:
    """Return True if a random model draws once for all images of a call, like a model that picks one of two networks.

    The result is True if in every call all draws of an image are equal, but two calls differ.
    """
    rows = min(TRIED_ROWS, len(x) * draws, TRIED_ROWS if most is None else most)
    if draws == 1 or rows < 2 or draws_for_each_image(model):
        return False
    some = x[: min(TRIED_IMAGES, rows // 2)].detach().clone()
    times = rows // len(some)
    calls = max(TRIED_CALLS, FEWEST_DRAWS // rows)
    counted = cast(CountsImages, model).counted() if supports(model, CountsImages) else Passes()

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).double().nan_to_num(nan=0.0).abs().max())

    # The largest difference between two calls, and the largest difference between the copies of an image in a call.
    between = within = 0.0
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        first: Tensor | None = None
        for _ in range(calls):
            logits = logits_of_draws(model, some, times)
            within = max(within, apart(logits, repeat_batch(logits[: len(some)], times)))
            first = logits if first is None else first
            if differ(first, logits):
                between = max(between, apart(first, logits))
            # An image's position in a batch may change the last bits of its logits, in bfloat16 even the second digit.
            if between > 0 and within >= ALIKE * between:
                break
    if supports(model, CountsImages):
        # The counter should count only the images of attacks, so the images of this test are subtracted.
        cast(CountsImages, model).count(counted - cast(CountsImages, model).counted())
    return within < ALIKE * between
