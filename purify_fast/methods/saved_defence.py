"""A trained defence as files: what it was trained to, in ``model.safetensors``, its facts in ``model.json``.

The classifier's weights are there only if they were trained together with the purifier.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from .._fingerprint import weights_fingerprint
from ..defences.base import Defence
from ..training.checkpoint import read_model, save_model
from ..training.classifier import load_classifier

_CLASSIFIER = "classifier."
D = TypeVar("D", bound=Defence)


def save_defence(defence: Defence, folder: str | Path) -> None:
    """Write a defence, with a fingerprint of its classifier; each file appears whole or not at all.

    Args:
        defence: what to write.
        folder: where to; ``model.safetensors`` and ``model.json`` are written there.
    """
    facts = {"classifier": weights_fingerprint(defence.classifier), "own_classifier": defence.own_classifier}
    facts |= {"acts_from_step": defence.acts_from_step}
    save_model(folder, type(defence).__name__, defence.arguments, _saved(defence), **facts)


def _saved(defence: Defence) -> dict[str, Tensor]:
    state = defence.state_dict()
    return {name: value for name, value in state.items() if defence.own_classifier or not name.startswith(_CLASSIFIER)}


def read_defence(
    make: Callable[[nn.Module, dict[str, Any]], D],
    kind: str,
    folder: str | Path,
    classifier: nn.Module | None = None,
    check: bool = True,
) -> D:
    """Read a defence that `save_defence` wrote, around ``classifier``.

    Args:
        make: from the classifier and the saved arguments to a defence.
        kind: the name of the defence's class.
        folder: where ``model.safetensors`` and ``model.json`` are.
        classifier: the one the purifier was trained for; None takes the one the command line keeps in
            ``folder/classifier``. If its copy was trained too, only its architecture counts.
        check: refuse another classifier; turn off for one that was fine-tuned or converted since.

    Returns:
        The defence in evaluation mode, on the classifier's device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: broken files, another kind of model, another classifier.
    """
    facts, state = read_model(folder)
    if facts.get("kind") != kind:
        article = "an" if kind[0] in "AEIOU" else "a"
        raise ValueError(f"{folder} holds a {facts.get('kind')!r}, not {article} {kind}")
    if classifier is None:
        classifier = load_classifier(Path(folder) / "classifier")
    own = facts.get("own_classifier", False)
    found = weights_fingerprint(classifier)
    if check and not own and found != facts["classifier"]:
        raise ValueError(
            f"classifier: its weights ({found}) are not those {folder} was trained for ({facts['classifier']}); "
            "pass check=False if that is meant"
        )
    defence = make(classifier, facts["arguments"])
    defence.own_classifier = own
    defence.acts_from_step = facts.get("acts_from_step", {})
    wanted = _saved(defence)
    odd = wanted.keys() ^ state.keys() or {name for name in state if wanted[name].shape != state[name].shape}
    if odd:
        raise ValueError(f"{folder}: its tensors do not fit its arguments, or the module given: {sorted(odd)[:4]} ...")
    defence.load_state_dict(state, strict=False)  # all but a frozen classifier's, checked above
    return defence.eval()
