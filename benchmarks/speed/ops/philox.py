"""Cases of the op philox. A shape has the number of ids, the number of draws, and the number of values in a draw."""

from __future__ import annotations

import torch

from purify_fast.ops import Stream, philox

from . import Case

SHAPES = ((256, 8, 128), (64, 1, 3072))
LARGE = ((1024, 8, 8192), (256, 8, 128))
KINDS = ((torch.float32, "normal"), (torch.float32, "uniform"), (torch.int32, "bits"))


def case(shape: tuple[int, ...], dtype: torch.dtype, distribution: str) -> Case:
    ids, draws, numel = shape
    return Case(
        lambda: (torch.arange(ids), torch.tensor([1234567890123])),
        lambda ids, seed: philox(seed, ids, numel, stream=Stream.LATENT, distribution=distribution, draws=draws),
        {"forward": "4*n + 8*B"},
        symbols={"B": ids},
    )
