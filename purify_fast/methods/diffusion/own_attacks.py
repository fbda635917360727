"""Attacks on purifiers by diffusion that the protocol "strong" adds to its own.

Lee & Kim (ICCV 2023, arXiv 2303.09051) judge such purifiers by PGD with 200 steps of 20 draws each. DiffBreak's attack
(arXiv 2411.16598) uses that noise hides low frequencies least, and chooses filters. Here a single filter is applied to
the gradient:

    g_low = F^-1 (m F g),   m 1 for frequencies of at most a quarter of the highest one in each direction, else 0

The purifier itself judges the images that a filtered gradient finds, like every success.

DiffAttack (Kang, Song & Li, NeurIPS 2023, arXiv 2311.16124, section 3) adds a loss of the states on the way, so that
the gradient does not come through all steps alone:

    L = L_cls + w mean over t of mean (x_t - x'_t)^2,   x_t the noised image, x'_t the state on the way back

"strong" does not take it: docs/diffusion.md has what it gave.
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
        seen = x.view_as(x)
        if seen.requires_grad:
            seen.register_hook(low_frequencies)
        return self.model(seen)


class _Added(torch.autograd.Function):
    """Logits whose gradient brings that of another loss, one number for each row, with a weight."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.of_loss = torch.full_like(loss, weight)
        return logits.view_as(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.of_loss, None


class DeviatedReconstruction(nn.Module):
    """A purifier whose gradient is that of DiffAttack's loss; give it to an attack as ``gradients_from``.

    The values are the purifier's own logits. An attack that sums its loss over the images follows the gradient of
    L_cls + w L_dev, and compares its points by L_cls.

    Args:
        defence: a `DiffusionPurifier`.
        weight: w, the weight of the deviation beside the attack's loss.
    """

    draws_for_each_image = True

    def __init__(self, defence: Any, weight: float = 1.0):
        super().__init__()
        self.defence, self.weight = defence, weight
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``, float32.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
        """
        purified, deviation = self.defence.purify_with_deviation(x)
        logits = self.defence.aggregate(self.defence.classify(purified))
        return _Added.apply(logits, deviation, self.weight)


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
