"""K reconstructions per image: latents drawn from the prior, decoded under each image's condition.

    z_bk ~ N(0, I) from the Philox stream LATENT, draw index k;   out_bk = decoder(z_bk, c_b)

CARSO's inference (arXiv 2306.06081, section 4.4). K is folded into the batch, and the decoder sees the condition once
per image. This is the reference, the plain layers, on every device: torch.compile fuses it with what surrounds it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .philox import Stream, philox


def latents(seed: Tensor, sample_ids: Tensor, samples: int, latent_dim: int) -> Tensor:
    """Prior latents [B, samples, latent_dim], float32; sample k of an image is draw index k."""
    return philox(seed, sample_ids, latent_dim, stream=Stream.LATENT, distribution="normal", draws=samples)


def decode_samples(decoder: Callable[[Tensor, Tensor], Tensor], condition: Tensor, z: Tensor) -> Tensor:
    """Decode K latents per image.

    Args:
        decoder: maps ``z [B, K, latent_dim]`` and ``condition [B, cond_dim]`` to image logits ``[B * K, C, H, W]``.
        condition: ``[B, cond_dim]``.
        z: ``[B, K, latent_dim]``, from `latents`, or any.

    Returns:
        Image logits (before the sigmoid) ``[B, K, C, H, W]``, in the decoder's dtype; differentiable.

    Raises:
        ValueError: z is not three-dimensional or its batch is not the condition's.
    """
    if z.dim() != 3 or z.shape[0] != condition.shape[0]:
        raise ValueError(f"z must be [B, K, latent_dim] with B = {condition.shape[0]}, got {list(z.shape)}")
    out = decoder(z, condition)
    return out.unflatten(0, (z.shape[0], z.shape[1]))
