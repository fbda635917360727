"""Purification by diffusion: the defence, its schedules and solvers, and the files of denoisers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_exports

if TYPE_CHECKING:
    from .defence import RECIPES as RECIPES, DiffusionPurifier as DiffusionPurifier
    from .denoiser import load_denoiser as load_denoiser, save_denoiser as save_denoiser
    from .process import Process as Process, Schedule as Schedule
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
