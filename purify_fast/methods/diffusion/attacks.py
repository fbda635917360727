"""The attacks that the protocol "strong" adds for a purifier by diffusion.

These are the attack of Lee & Kim (ICCV 2023, arXiv 2303.09051), PGD with 200 steps of 20 draws each, and an attack of
our own. As DiffBreak (arXiv 2411.16598), it uses the fact that noise hides low frequencies least: it filters the
gradient g to F^-1 (m F g). F is the Fourier transform. m is 1 for frequencies up to a quarter of the highest in each
direction, and otherwise 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...attacks import APGD

#: The highest frequency in the filtered gradient, in each direction, as a share of the image's highest frequency.
KEPT = 0.25
#: Number of draws over which a step averages the gradient.
DRAWS = 20
LOW = f"APGD by gradients of low frequencies, EOT {DRAWS}"


def strong_attacks(defence: nn.Module, norm: str, eps: float) -> list[tuple[str, dict[str, Any]]]:
    """Return the attacks for a purifier in a ball, as pairs that the evaluation makes into an `AttackSpec`."""
    low = APGD(loss="ce", eot_iter=DRAWS, precision="float32")
    own = ("AttackSpec", {"attack": low, "label": LOW, "through": LowFrequencyGradient(defence)})
    # The length of a step of Lee and Kim's attack is for L-inf.
    return [("lee_kim_2023", {"eps": eps, "leave": True}), own] if norm == "linf" else [own]


def low_frequencies(image: Tensor) -> Tensor:
    """Remove the high frequencies of images. The result has the same shape and dtype."""
    height, width = image.shape[-2:]
    wide = torch.promote_types(image.dtype, torch.float32)
    rows = torch.fft.fftfreq(height, device=image.device).abs() <= KEPT / 2
    columns = torch.fft.rfftfreq(width, device=image.device) <= KEPT / 2
    kept = torch.fft.rfft2(image.to(wide)) * (rows[:, None] & columns)
    return torch.fft.irfft2(kept, s=(height, width)).to(image.dtype)


class LowFrequencyGradient(nn.Module):
    """A model whose gradient with respect to the images has only low frequencies."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.kept = model, KEPT
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits, ``[B, classes]``."""
        seen = x.view_as(x)
        if seen.requires_grad:
            seen.register_hook(low_frequencies)
        return self.model(seen)
