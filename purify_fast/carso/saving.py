"""A trained defence as files: the purifier in ``model.safetensors``, its facts in ``model.json``.

The classifier's weights are there only if they were trained together with the purifier.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ..training.checkpoint import fingerprint, read_model, save_model
from ..training.classifier import load_classifier
from .model import Carso

_CLASSIFIER = "classifier."


def save(defence: Carso, folder: str | Path) -> None:
    """Write the purifier to ``folder``, with a fingerprint of its classifier; each file whole or absent."""
    state = _saved(defence)
    facts = {"classifier": fingerprint(defence.classifier), "own_classifier": defence.own_classifier}
    save_model(folder, "Carso", defence.arguments, state, **facts)


def _saved(defence: Carso) -> dict[str, Tensor]:
    state = defence.state_dict()
    return {name: value for name, value in state.items() if defence.own_classifier or not name.startswith(_CLASSIFIER)}


def load(folder: str | Path, classifier: nn.Module | None = None, check: bool = True) -> Carso:
    """Read a defence that `save` wrote, around ``classifier``.

    Args:
        folder: where ``model.safetensors`` and ``model.json`` are.
        classifier: the one the purifier was trained for; None takes the one the command line keeps in
            ``folder/classifier``. If its copy was trained too, only its architecture counts.
        check: refuse another classifier; turn off for one that was fine-tuned or converted since.

    Returns:
        The defence in evaluation mode, on the classifier's device.

    Raises:
        FileNotFoundError: a file is missing. ValueError: broken files, another kind of model, another classifier.
    """
    facts, state = read_model(folder)
    if facts.get("kind") != "Carso":
        raise ValueError(f"{folder} holds a {facts.get('kind')!r}, not a Carso")
    if classifier is None:
        classifier = load_classifier(Path(folder) / "classifier")
    own = facts.get("own_classifier", False)
    found = fingerprint(classifier)
    if check and not own and found != facts["classifier"]:
        raise ValueError(
            f"classifier: its weights ({found}) are not those {folder} was trained for ({facts['classifier']}); "
            "pass check=False if that is meant"
        )
    defence = Carso(classifier, **facts["arguments"])
    defence.own_classifier = own
    wanted = _saved(defence).keys()
    if wanted != set(state):
        raise ValueError(f"{folder}: its tensors do not fit its arguments: {sorted(wanted ^ set(state))[:4]} ...")
    defence.load_state_dict(state, strict=False)  # all but a frozen classifier's, checked above
    return defence.eval()
