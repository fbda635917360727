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
    from .losses import training_loss as training_loss
    from .purifier import PurifierAdapter as PurifierAdapter
    from .task import AtopTask as AtopTask

__all__, __getattr__, __dir__ = lazy_exports(__name__)
