"""Attacks on purifiers by diffusion that the protocol "strong" adds to its own.

Lee & Kim (ICCV 2023, arXiv 2303.09051) judge such purifiers by PGD with 200 steps of 20 draws each. DiffBreak's attack
(arXiv 2411.16598) uses that noise hides low frequencies least, and chooses filters. Here a single filter is applied to
the gradient:

    g_low = F^-1 (m F g),   m 1 for frequencies of at most a quarter of the highest one in each direction, else 0

The purifier itself judges the images that a filtered gradient finds, like every success.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...attacks import APGD
from ...evaluation import AttackSpec, lee_kim_2023

#: The share of the frequencies, in each direction, that the gradient keeps.
KEPT = 0.25
#: Number of draws that a step averages.
DRAWS = 20
LOW = f"APGD by gradients of low frequencies, EOT {DRAWS}"


class _LowFrequencies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return low_frequencies(grad)


def low_frequencies(image: Tensor) -> Tensor:
    """Remove the higher frequencies of images; the result has their shape and dtype.

    Args:
        image: ``[..., H, W]``.
    """
    height, width = image.shape[-2:]
    wide = torch.promote_types(image.dtype, torch.float32)
    rows = torch.fft.fftfreq(height, device=image.device).abs() <= KEPT / 2
    columns = torch.fft.rfftfreq(width, device=image.device) <= KEPT / 2
    kept = torch.fft.rfft2(image.to(wide)) * (rows[:, None] & columns)
    return torch.fft.irfft2(kept, s=(height, width)).to(image.dtype)


class LowFrequencyGradient(nn.Module):
    """A model whose gradient to the images has only low frequencies.

    Args:
        model: any module from images ``[B, C, H, W]`` to logits.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.kept = model, KEPT
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits, ``[B, classes]``.

        Args:
            x: images ``[B, C, H, W]``.
        """
        return self.model(_LowFrequencies.apply(x))


def strong_attacks(defence: Any, norm: str, eps: float) -> list[AttackSpec]:
    """The additional attacks of "strong".

    Args:
        defence: a `DiffusionPurifier`.
        norm: norm of the ball; Lee and Kim's steps are those of "linf".
        eps: radius in image units.
    """
    low = APGD(loss="ce", eot_iter=DRAWS, precision="float32")
    rows = [AttackSpec(low, label=LOW, gradients_from=LowFrequencyGradient(defence))]
    return [lee_kim_2023(eps, leave=True), *rows] if norm == "linf" else rows
