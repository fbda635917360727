"""AToP: the defence, its purifiers, its training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_exports

if TYPE_CHECKING:
    from .config import AtopConfig as AtopConfig
    from .defence import Atop as Atop
    from .discriminator import PatchDiscriminator as PatchDiscriminator
    from .generators.deepfill import DeepFillGenerator as DeepFillGenerator
    from .generators.masked_autoencoder import MaskedAutoencoder as MaskedAutoencoder
    from .generators.small_generator import SmallGenerator as SmallGenerator
    from .purifier import Purifier as Purifier
    from .saving import load as load
    from .task import AtopTask as AtopTask

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
__getattr__, __dir__ = lazy_exports(
    __name__,
    Atop=".defence",
    AtopConfig=".config",
    AtopTask=".task",
    DeepFillGenerator=".generators.deepfill",
    MaskedAutoencoder=".generators.masked_autoencoder",
    PatchDiscriminator=".discriminator",
    Purifier=".purifier",
    SmallGenerator=".generators.small_generator",
    load=".saving",
)
