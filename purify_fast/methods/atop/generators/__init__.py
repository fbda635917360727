"""Networks that repair images: DeepFillv2's generator, a small one of the same kind, a masked autoencoder."""

from .deepfill import DeepFillGenerator
from .masked_autoencoder import VIT_B16, MaskedAutoencoder
from .small_generator import SmallGenerator

__all__ = ["VIT_B16", "DeepFillGenerator", "MaskedAutoencoder", "SmallGenerator"]
