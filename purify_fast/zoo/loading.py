"""The models of the zoo, loaded without a network."""

from __future__ import annotations

import builtins
from pathlib import Path

from torch import nn

from ..methods.loading import load_defence
from ..training import is_classifier, load_classifier
from . import cards


def list() -> builtins.list[str]:
    """The names of all models, sorted."""
    return cards.names()


def folder(name: str) -> Path:
    """The folder that a model was saved in; do not write there, it belongs to the installed package.

    The classifier of a defence is not inside: `classifier_folder` says where it is, and `load` reads both.

    Args:
        name: one of `list`.

    Raises:
        ValueError: there is no such model; the message names those that there are.
    """
    return cards.known_folder(name)


def classifier_folder(name: str) -> Path:
    """The folder of the classifier that stands behind a defence of the zoo.

    Args:
        name: one of `list`, a defence.

    Raises:
        ValueError: there is no such model, or it is a classifier itself.
    """
    behind = cards.card(name).classifier
    if behind is None:
        raise ValueError(f"name must be a defence of the zoo, got {name!r}, whose card names no classifier")
    return folder(behind)


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
    if is_classifier(path):
        return load_classifier(path)
    return load_defence(path, load_classifier(classifier_folder(name)))
