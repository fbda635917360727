"""Cases of the op diffusion_step: a sampler's states in float32 and a denoiser's predictions."""

from __future__ import annotations

import torch

from purify_fast.ops import diffusion_step

from . import Case, kinds, normal

SHAPES = ((128, 3, 32, 32), (8, 3, 256, 256))
LARGE = ((128, 3, 256, 256), (4096, 3, 32, 32))
KINDS = kinds("fixed", "learned", "noiseless")
#: A DDPM step that clips the image. The last two are the bounds of the logarithm of a learned variance.
COEFFICIENTS = (1.25, -0.75, 1.0, 0.4, 0.6, 0.3, -4.0, -2.0)


def case(shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Case:
    b, c, *sides = shape
    halves = 2 if variant == "learned" else 1
    return Case(
        lambda: (
            normal(*shape, dtype=torch.float32),
            normal(b, halves * c, *sides, dtype=dtype),
            torch.tensor(COEFFICIENTS),
            torch.tensor([1234567890123]),
            torch.arange(b) // 2,
            torch.arange(b) % 2,
            torch.tensor([7]),
        ),
        lambda x, prediction, coefficients, seed, ids, draws, step: diffusion_step(
            x,
            prediction,
            coefficients=coefficients,
            seed=seed,
            sample_ids=ids,
            draws=draws,
            step=step,
            noisy=variant != "noiseless",
        ),
        {"forward": "(8 + N*s)*n", "backward": "(12 + 2*N*s)*n"},
        differentiable=(0, 1),
        symbols={"N": halves},
    )
