"""AToP: the defence, its purifiers, its training."""

from .config import AtopConfig
from .defence import Atop
from .discriminator import PatchDiscriminator
from .generators.deepfill import DeepFillGenerator
from .generators.masked_autoencoder import MaskedAutoencoder
from .generators.small_generator import SmallGenerator
from .purifier import Purifier
from .saving import load
from .task import AtopTask

__all__ = [
    "Atop",
    "AtopConfig",
    "AtopTask",
    "DeepFillGenerator",
    "MaskedAutoencoder",
    "PatchDiscriminator",
    "Purifier",
    "SmallGenerator",
    "load",
]
