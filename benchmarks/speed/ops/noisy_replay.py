"""Cases of the op noisy_replay: images and their adversarial examples."""

from __future__ import annotations

import torch

from purify_fast.ops import noisy_replay

from . import Case, kinds, uniform

SHAPES = ((128, 3, 32, 32), (128, 1, 28, 28), (256, 3, 64, 64))
LARGE = ((256, 3, 224, 224), (1024, 3, 32, 32))
KINDS = kinds("quarter", "all")


def case(shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Case:
    batch = shape[0]
    # The drifts are evenly spaced in [0, 1), so about a quarter of them are above 0.75.
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
        # At each position, the op reads an element of only one of the two images.
        {"forward": "2*n*s"},
    )
