"""Defines what the defences of all methods share: descriptions of their parts, and the file of a saved defence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._settings import weights_fingerprint
from ..defences.base import Defence


def description(module: nn.Module, kinds: Mapping[str, type[nn.Module]]) -> dict[str, Any]:
    """Describe a module by JSON values for `rebuilt`, and a module of the user's own only by its class's name."""
    for name, kind in kinds.items():
        if type(module) is kind:
            return {"kind": name, "arguments": module.arguments}
    return {"kind": type(module).__qualname__, "arguments": None}


def rebuilt(
    facts: Mapping[str, Any], module: nn.Module | None, kinds: Mapping[str, type[nn.Module]], folder: object
) -> nn.Module:
    """Make the module of a saved `description`, or return the user's ``module``, if it has that description."""
    if module is None:
        if facts["kind"] not in kinds:
            raise ValueError(f"purifier must be given: {folder} holds the weights of a {facts['kind']} of your own")
        return kinds[facts["kind"]](**facts["arguments"])
    own = description(module, kinds)
    if own["kind"] != facts["kind"] or own["arguments"] not in (None, facts["arguments"]):
        raise ValueError(f"purifier must fit the saved weights: {folder} holds {dict(facts)}, got {own}")
    return module


def save_defence(defence: Defence, folder: str | Path) -> None:
    """Write a defence to ``model.safetensors``: the trained weights, and the classifier's fingerprint."""
    # A defence that is only called needs nothing of files.
    from ..training.run import save_model

    if defence.compute_dtype is not None:
        raise ValueError(f"a copy of a {type(defence).__name__} cannot be saved: save the defence itself")
    fingerprint = weights_fingerprint(defence.classifier)
    save_model(folder, type(defence).__name__, defence.arguments, trained_tensors(defence), classifier=fingerprint)


def trained_tensors(defence: Defence) -> dict[str, Tensor]:
    """Return the tensors that a saved defence has: all except those of the classifier."""
    return {name: value for name, value in defence.state_dict().items() if not name.startswith("classifier.")}
