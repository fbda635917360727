"""Any saved defence, read back."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..training import is_classifier
from ..training.checkpoint import read_facts
from .atop.defence import Atop
from .atop.files import load_atop
from .carso.defence import Carso
from .carso.files import load_carso


def load_defence(
    folder: str | Path,
    classifier: nn.Module | None = None,
    *,
    purifier: nn.Module | None = None,
    check: bool = True,
) -> Carso | Atop:
    """Read a defence that its ``save`` wrote, around ``classifier``, in evaluation mode.

    Args:
        folder: where ``model.safetensors`` and ``model.json`` are.
        classifier: the one it was trained for; None takes the one the command line keeps in ``folder/classifier``.
        purifier: of an AToP with a purifier of yours: a module of its architecture.
        check: refuse another classifier; turn off for one that was fine-tuned or converted since.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: broken files, no defence, another classifier.
    """
    kind = read_facts(folder)["kind"]
    if is_classifier(folder):
        raise ValueError(f"{folder} holds a classifier, a {kind}, and no defence: load_classifier reads it")
    if kind == "Atop":
        return load_atop(folder, classifier, purifier, check)
    if purifier is not None:
        raise ValueError(f"purifier: {folder} holds a {kind!r}, which brings its own")
    return load_carso(folder, classifier, check)
