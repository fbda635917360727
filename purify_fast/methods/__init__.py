"""The four methods of this package: CARSO, AToP, ARREST and diffusion. No method imports another method."""

from __future__ import annotations

import functools
import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trainings import Method


@functools.cache
def all_methods() -> dict[str, Method]:
    """Return the methods by the names of their packages: each has a module ``method``, which describes it as METHOD."""
    folders = [folder.name for folder in pkgutil.iter_modules(__path__) if folder.ispkg]
    return {name: import_module(f"{__name__}.{name}.method").METHOD for name in folders}
