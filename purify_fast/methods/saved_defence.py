"""A trained defence as files: what it was trained to, in ``model.safetensors``, its facts in ``model.json``.

The classifier's weights are there only if they were trained together with the purifier.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .._tensors import weights_fingerprint
from ..defences.base import Defence
from ..training.checkpoint import save_model


def save_defence(defence: Defence, folder: str | Path) -> None:
    """Write the purifier, and a classifier trained with it; `purify_fast.load_defence` reads them back.

    Each file appears whole or not at all. A fingerprint of the classifier is among the facts.

    Args:
        defence: what to write.
        folder: where to; ``model.safetensors`` and ``model.json`` are written there.
    """
    facts = {"classifier": weights_fingerprint(defence.classifier), "own_classifier": defence.own_classifier}
    facts |= {"acts_from_step": defence.acts_from_step}
    save_model(folder, type(defence).__name__, defence.arguments, trained_tensors(defence), **facts)


def trained_tensors(defence: Defence) -> dict[str, Tensor]:
    """What a saved defence holds: its tensors without those of a frozen classifier."""
    state = defence.state_dict()
    return {
        name: value for name, value in state.items() if defence.own_classifier or not name.startswith("classifier.")
    }
