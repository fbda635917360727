"""AToP: the defence, its purifiers, its training."""

from ..nn import DeepFillGenerator, MaskedAutoencoder, PatchDiscriminator, Purifier, SmallGenerator
from .model import Atop
from .saving import load
from .training import AtopConfig, AtopTask

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
