"""A trained CARSO read back from its files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ...training.defences import load_defence
from .defence import Carso


def load(folder: str | Path, classifier: nn.Module | None = None, check: bool = True) -> Carso:
    """Read a defence that `Carso.save` wrote; arguments and errors as in `purify_fast.training.load_defence`."""
    return load_defence(lambda given, arguments: Carso(given, **arguments), "Carso", folder, classifier, check)
