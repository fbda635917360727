"""Diffusion purifiers: the training of their denoisers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_exports

if TYPE_CHECKING:
    from .config import DiffusionConfig as DiffusionConfig
    from .task import DiffusionTask as DiffusionTask

__all__, __getattr__, __dir__ = lazy_exports(__name__)
