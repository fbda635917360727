"""Loads saved defences of all methods."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._settings import torch_defaults, weights_fingerprint
from ..defences.base import Defence
from ..training import load_classifier
from ..training.classifier import rebuilding, written_by
from ..training.run import read_model
from . import all_methods
from .saving import trained_tensors


def needs_classifier(folder: str | Path) -> bool:
    """Return True if a folder holds a part of a defence, such as a denoiser, which was trained without a classifier."""
    return "classifier" not in _read(folder)[0]


def _read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], type[Defence]]:
    """Read a saved defence, or a part of it, and find its class; ValueError for another kind of model."""
    facts, state = read_model(folder)
    for name, method in all_methods().items():
        if facts["kind"] == method.defence or facts["kind"] in method.parts:
            prefix = method.parts.get(facts["kind"], "")
            defence = getattr(import_module(f"{__package__}.{name}"), str(method.defence))
            return facts, {f"{prefix}{key}": value for key, value in state.items()}, defence
    advice = "if it is a classifier, load_classifier loads it"
    raise ValueError(f"{folder} holds a {facts['kind']!r}{written_by(facts)}, not a known defence: {advice}")


@torch_defaults()
def load_defence(
    folder: str | Path,
    classifier: nn.Module | None = None,
    *,
    purifier: nn.Module | None = None,
    check: bool = True,
    **changes: Any,
) -> Any:
    """Load a saved defence, such as a `Carso`, with its classifier, in evaluation mode on the classifier's device.

    A denoiser that `purify_fast.methods.diffusion.save_denoiser` saved is loaded as a `DiffusionPurifier`.

    Args:
        folder: folder of ``model.safetensors``.
        classifier: the classifier for which the defence was trained; None loads it from ``folder/classifier``, where
            the command line saves it.
        purifier: a module with the architecture of the saved purifier. It is required only if you saved an AToP with
            your own purifier, or a `DiffusionPurifier` with your own denoiser.
        check: whether a classifier with other weights is refused. Set it to False for a classifier that was fine-tuned
            or converted after the defence was trained.
        changes: arguments of the defence that replace the saved arguments, such as ``samples=4``. The fields of a
            mapping replace the saved fields, such as ``process={"t_star": 0.1}`` of a `DiffusionPurifier` or a denoiser
            (see `purify_fast.methods.diffusion.Process`).

    Raises:
        FileNotFoundError: a file is missing, or the classifier is neither given nor in the folder.
        ValueError: the file is damaged or holds no defence, or an argument does not fit it or is missing.
    """
    facts, state, kind = _read(folder)
    arguments = dict[str, Any](facts["arguments"])
    if other := changes.keys() - arguments.keys():
        names = ", ".join(arguments)
        raise ValueError(f"{min(other)} is no argument of the {facts['kind']!r} in {folder}: give {names}")
    for name, value in changes.items():
        arguments[name] = {**arguments[name], **value} if isinstance(value, Mapping) else value
    if classifier is None:
        if not (Path(folder) / "classifier").is_dir():
            raise FileNotFoundError(f"classifier must be given: {Path(folder) / 'classifier'} is missing")
        classifier = load_classifier(Path(folder) / "classifier")
    elif not isinstance(classifier, nn.Module):
        raise TypeError(f"classifier must be a module, such as load_classifier(folder) returns, got {classifier!r}")
    # A part without a classifier fits any classifier.
    if check and "classifier" in facts and weights_fingerprint(classifier) != facts["classifier"]:
        raise ValueError(f"classifier must have the weights that {folder} was trained for; check=False allows others")
    with rebuilding(folder, facts):
        defence = kind(classifier=classifier, **kind.rebuilt_arguments(arguments, purifier, folder))
    if odd := trained_tensors(defence).keys() ^ state.keys():
        raise ValueError(f"{folder} holds a model with other tensors, such as {', '.join(sorted(odd)[:4])}")
    # The state has no tensors of the classifier.
    defence.load_state_dict(state, strict=False)
    return defence.eval()
