"""Ids, draws and numbers per draw: latents for a batch, noise for images of 3x32x32."""

from __future__ import annotations

import torch

from purify_fast.ops import Stream, philox

from . import Case

SHAPES = ((256, 8, 128), (64, 1, 3072))


def case(shape: tuple[int, ...], distribution: str) -> Case:
    ids, draws, numel = shape
    count = ids * draws * numel
    return Case(
        shape,
        torch.int32 if distribution == "bits" else torch.float32,
        lambda: (torch.arange(ids), torch.tensor([1234567890123])),
        lambda ids, seed: philox(seed, ids, numel, stream=Stream.LATENT, distribution=distribution, draws=draws),
        {"forward": 4 * count + 8 * ids},
        {"forward": {"bits": 25, "uniform": 27, "normal": 45}[distribution] * count},  # 100 integer ops give 4 words
        distribution,
    )


def cases() -> list[Case]:
    return [case(shape, name) for name in ("normal", "uniform", "bits") for shape in SHAPES]
