"""AToP (Adversarial Training on Purification, arXiv 2401.16352): the defence, its purifiers and its training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_exports

if TYPE_CHECKING:
    from .defence import Atop as Atop, PurifierAdapter as PurifierAdapter, build_purifier as build_purifier
    from .generators import DeepFillGenerator as DeepFillGenerator, SmallGenerator as SmallGenerator
    from .method import AtopConfig as AtopConfig
    from .task import RECIPES as RECIPES, AtopTask as AtopTask, PatchDiscriminator as PatchDiscriminator
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
