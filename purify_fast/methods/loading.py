"""Loads saved defences of all methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._tensors import torch_defaults, weights_fingerprint
from ..training import load_classifier
from ..training.checkpoint import read_model
from ..training.classifier import rebuilding, written_by
from .atop.purifier import PURIFIERS
from .diffusion.denoiser import DENOISER_KIND, rebuilt_denoiser
from .recipes import METHODS
from .saving import rebuilt, trained_tensors

#: The classes of defences by the kinds that files name.
_DEFENCES: dict[str, Any] = {
    method.defence.__name__: method.defence for method in METHODS.values() if method.defence is not None
}


def is_denoiser(folder: str | Path) -> bool:
    """Return True if a folder holds a denoiser without a classifier."""
    return bool(_read(folder)[0]["kind"] == DENOISER_KIND)


def _read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a saved defence or denoiser; ValueError for another kind of model."""
    facts, state = read_model(folder)
    if facts["kind"] not in (*_DEFENCES, DENOISER_KIND):
        advice = "if it is a classifier, load_classifier loads it"
        raise ValueError(f"{folder} holds a {facts['kind']!r}{written_by(facts)}, not a known defence: {advice}")
    return facts, state


@torch_defaults()
def load_defence(
    folder: str | Path,
    classifier: nn.Module | None = None,
    *,
    purifier: nn.Module | None = None,
    process: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Any:
    """Load a saved defence, such as a `Carso`, with its classifier, in evaluation mode on the classifier's device.

    A denoiser that `purify_fast.methods.diffusion.save_denoiser` saved is loaded as a `DiffusionPurifier`.

    Args:
        folder: folder of ``model.safetensors``.
        classifier: the classifier for which the defence was trained; None loads it from ``folder/classifier``, where
            the command line saves it.
        purifier: a module with the architecture of the saved purifier. It is required only if you saved an AToP with
            your own purifier, or a `DiffusionPurifier` with your own denoiser.
        process: fields of `purify_fast.methods.diffusion.Process` that replace the saved fields, such as ``t_star`` and
            ``steps``; only for a `DiffusionPurifier` or a denoiser.
        check: whether a classifier with other weights is refused. Set it to False for a classifier that was fine-tuned
            or converted after the defence was trained.

    Raises:
        FileNotFoundError: a file is missing, or the classifier is neither given nor in the folder.
        ValueError: the file is damaged or holds no defence, or an argument does not fit it or is missing.
    """
    facts, state = _read(folder)
    kind, arguments = facts["kind"], dict[str, Any](facts["arguments"])
    if purifier is not None and not {"purifier", "denoiser"} & arguments.keys():
        raise ValueError(f"purifier must be None, got a module: {folder} holds a {kind!r}, which includes its purifier")
    if process is not None:
        if "process" not in arguments:
            raise ValueError(f"process must be None, got {process!r}: {folder} holds a {kind!r}, which has no process")
        arguments["process"] = {**arguments["process"], **process}
    if classifier is None:
        if not (Path(folder) / "classifier").is_dir():
            raise FileNotFoundError(f"classifier must be given: {Path(folder) / 'classifier'} is missing")
        classifier = load_classifier(Path(folder) / "classifier")
    elif not isinstance(classifier, nn.Module):
        raise TypeError(f"classifier must be a module, such as load_classifier(folder) returns, got {classifier!r}")
    if kind == DENOISER_KIND:
        # The denoiser was trained without a classifier, so it fits any classifier.
        check, kind, state = False, "DiffusionPurifier", {f"denoiser.module.{name}": state[name] for name in state}
    if check and weights_fingerprint(classifier) != facts["classifier"]:
        raise ValueError(f"classifier must have the weights that {folder} was trained for; check=False allows others")
    with rebuilding(folder, facts):
        if "purifier" in arguments:
            arguments["purifier"] = rebuilt(arguments["purifier"], purifier, PURIFIERS, folder)
        if "denoiser" in arguments:
            arguments["denoiser"] = rebuilt_denoiser(arguments["denoiser"], purifier, folder)
        defence = _DEFENCES[kind](classifier=classifier, **arguments)
    defence.bank = facts.get("bank", {})
    if odd := trained_tensors(defence).keys() ^ state.keys():
        raise ValueError(f"{folder} holds a model with other tensors, such as {', '.join(sorted(odd)[:4])}")
    # The state has no tensors of the classifier.
    defence.load_state_dict(state, strict=False)
    return defence.eval()
