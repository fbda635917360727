"""ARREST: adversarial finetuning with representation-guided distillation and noisy replay (arXiv 2308.16454)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_exports

if TYPE_CHECKING:
    from .method import ArrestConfig as ArrestConfig
    from .recipes import RECIPES as RECIPES
    from .task import ArrestTask as ArrestTask
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
