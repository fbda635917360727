"""Any saved defence, read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .._tensors import weights_fingerprint
from ..training import load_classifier
from ..training.checkpoint import read_model
from .atop.defence import Atop
from .atop.purifier import PURIFIERS
from .base import rebuilt, trained_tensors
from .carso.defence import Carso
from .diffusion.defence import DiffusionPurifier
from .diffusion.denoiser import ALONE, rebuilt_denoiser


def is_denoiser(folder: str | Path) -> bool:
    """Tell whether a folder holds a denoiser without a classifier.

    Args:
        folder: where a model was saved.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is broken.
    """
    return bool(read_model(folder)[0]["kind"] == ALONE)


def load_defence(
    folder: str | Path,
    classifier: nn.Module | None = None,
    *,
    purifier: nn.Module | None = None,
    process: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Carso | Atop | DiffusionPurifier:
    """Read a defence that its ``save`` wrote, around ``classifier``, in evaluation mode on the classifier's device.

    A denoiser that `purify_fast.methods.diffusion.save_denoiser` wrote alone becomes a `DiffusionPurifier`.

    Args:
        folder: where ``model.safetensors`` is.
        classifier: the one it was trained for; None takes the one the command line keeps in ``folder/classifier``. If
            the defence's copy was trained too, only its architecture counts.
        purifier: for an AToP with a purifier of yours, or a `DiffusionPurifier` with a denoiser of yours: a module of
            its architecture.
        process: fields of `purify_fast.methods.diffusion.Process` in place of those that were saved, such as ``t_star``
            and ``steps``; of a `DiffusionPurifier` or a denoiser alone.
        check: refuse another classifier; turn off for one that was fine-tuned or converted since.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a broken file, no defence, another classifier, a purifier is needed and not given, or a process
            that the denoiser was not trained for.
    """
    facts, state = read_model(folder)
    kind, arguments = facts["kind"], dict[str, Any](facts["arguments"])
    if kind not in ("Atop", "Carso", "DiffusionPurifier", ALONE):
        raise ValueError(f"{folder} holds a classifier, a {kind}, not a defence: load_classifier reads it")
    if purifier is not None and kind == "Carso":
        raise ValueError(f"purifier must be None, got a module: {folder} holds a {kind!r} with its own purifier")
    if process is not None and kind in ("Atop", "Carso"):
        raise ValueError(f"process must be None: {folder} holds a {kind!r}, which has no process")
    classifier = load_classifier(Path(folder) / "classifier") if classifier is None else classifier
    if kind == ALONE:
        # it was trained without a classifier, so that any classifier fits
        check, kind, state = False, "DiffusionPurifier", {f"denoiser.module.{name}": state[name] for name in state}
    own_classifier, weights = facts.get("own_classifier", False), weights_fingerprint(classifier)
    if check and not own_classifier and weights != facts["classifier"]:
        raise ValueError(
            f"classifier: its weights ({weights}) differ from those that {folder} was trained for "
            f"({facts['classifier']}); pass check=False if that is meant"
        )
    defence: Carso | Atop | DiffusionPurifier
    if kind == "Atop":
        purifier = rebuilt(arguments.pop("purifier"), purifier, PURIFIERS, folder)
        defence = Atop(classifier, purifier, **arguments)
    elif kind == "DiffusionPurifier":
        denoiser = rebuilt_denoiser(arguments.pop("denoiser"), purifier, folder)
        arguments["process"] = {**arguments["process"], **(process or {})}
        defence = DiffusionPurifier(denoiser, classifier, **arguments)
    else:
        defence = Carso(classifier, **arguments)
    defence.own_classifier = own_classifier
    defence.acts_from_step, defence.bank = facts.get("acts_from_step", {}), facts.get("bank", {})
    wanted = trained_tensors(defence)
    odd = wanted.keys() ^ state.keys() or {name for name in state if wanted[name].shape != state[name].shape}
    if odd:
        raise ValueError(f"{folder}: tensors do not fit the arguments, or the given module: {sorted(odd)[:4]} ...")
    defence.load_state_dict(state, strict=False)  # all but a frozen classifier's, checked above
    return defence.eval()
