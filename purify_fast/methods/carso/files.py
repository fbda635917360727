"""A trained CARSO read back from its files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..saved_defence import read_defence
from .defence import Carso


def load_carso(folder: str | Path, classifier: nn.Module | None = None, check: bool = True) -> Carso:
    """Read a defence that `Carso.save` wrote; errors as in `purify_fast.methods.saved_defence.read_defence`.

    Args:
        folder: where ``model.safetensors`` and ``model.json`` are.
        classifier: the one the purifier was trained for; None takes the one in ``folder/classifier``.
        check: whether another classifier is refused.
    """
    return read_defence(lambda given, arguments: Carso(given, **arguments), "Carso", folder, classifier, check)
