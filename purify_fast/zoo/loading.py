"""The models of the zoo, loaded without a network."""

from __future__ import annotations

import builtins
from pathlib import Path

from torch import nn

from ..methods.loading import load_defence
from ..training import is_classifier, load_classifier
from . import cards

#: What stands before a model's name where a folder may stand as well, as in ``purify-fast evaluate zoo:NAME``.
PREFIX = "zoo:"


def list() -> builtins.list[str]:
    """The names of all models, sorted."""
    return cards.names()


def folder(name: str) -> Path:
    """The folder that a model was saved in; do not write there, it belongs to the installed package.

    Args:
        name: one of `list`.

    Raises:
        ValueError: there is no such model; the message names those that there are.
    """
    return cards.known_folder(name)


def load(name: str) -> nn.Module:
    """A trained model, in evaluation mode, on the CPU.

    Args:
        name: one of `list`.

    Returns:
        Images ``[B, C, H, W]``, float32 in [0, 1], to logits ``[B, classes]``. A defence has its classifier inside.

    Raises:
        ValueError: there is no such model; the message names those that there are.
    """
    path = folder(name)
    return load_classifier(path) if is_classifier(path) else load_defence(path)
