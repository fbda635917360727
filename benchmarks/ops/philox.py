"""Ids, draws and numbers per draw: latents for a batch, noise for images of 3x32x32."""

from __future__ import annotations

import torch

from purify_fast.ops import Stream, philox

from . import Case

SHAPES = ((256, 8, 128), (64, 1, 3072))
LARGE = ((1024, 8, 8192), (256, 8, 128))


def case(shape: tuple[int, ...], distribution: str) -> Case:
    ids, draws, numel = shape
    return Case(
        shape,
        torch.int32 if distribution == "bits" else torch.float32,
        lambda: (torch.arange(ids), torch.tensor([1234567890123])),
        lambda ids, seed: philox(seed, ids, numel, stream=Stream.LATENT, distribution=distribution, draws=draws),
        {"forward": "4*n + 8*B"},
        # 100 integer operations give 4 words
        {"forward": {"bits": "25*n", "uniform": "27*n", "normal": "45*n"}[distribution]},
        distribution,
        symbols={"n": ids * draws * numel, "B": ids},
    )


def cases(shapes: tuple = SHAPES) -> list[Case]:
    return [case(shape, name) for name in ("normal", "uniform", "bits") for shape in shapes]
