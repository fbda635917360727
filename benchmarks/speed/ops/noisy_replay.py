"""Cases of the op noisy_replay: images and their adversarial examples.

In one variant a quarter of the images get noise in place of the attack, and in the other variant all images.
"""

from __future__ import annotations

import math

import torch

from purify_fast.ops import noisy_replay

from . import Case, kinds, uniform

SHAPES = ((128, 3, 32, 32), (128, 1, 28, 28), (256, 3, 64, 64))
LARGE = ((256, 3, 224, 224), (1024, 3, 32, 32))
KINDS = kinds("quarter", "all")


def case(shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Case:
    pixels, batch = math.prod(shape), shape[0]
    # The drifts are uniform in [0, 1), so a threshold of 0.75 selects a quarter of the images.
    threshold = 0.75 if variant == "quarter" else -1.0
    return Case(
        lambda: (
            uniform(*shape, dtype=dtype),
            uniform(*shape, dtype=dtype, seed=1),
            torch.arange(batch) / batch,
            torch.tensor([1234567890123]),
            torch.arange(batch),
        ),
        lambda x, adv, drift, seed, ids: noisy_replay(x, adv, drift, threshold, 8 / 255, seed, ids),
        # Only one of the two images is read. A replayed element needs a uniform number (27 operations, see `philox`)
        # and five more operations.
        {"forward": ("2*n*s", "32*r")},
        symbols={"r": pixels // 4 if variant == "quarter" else pixels},
    )
