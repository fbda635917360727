"""A trained AToP read back from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..saved_defence import read_defence
from .defence import Atop, description
from .purifier import PURIFIERS


def load_atop(
    folder: str | Path, classifier: nn.Module | None = None, purifier: nn.Module | None = None, check: bool = True
) -> Atop:
    """Read a defence that `Atop.save` wrote.

    Args:
        folder: where ``model.safetensors`` and ``model.json`` are.
        classifier: the one the purifier was trained for; None takes the one in ``folder/classifier``.
        purifier: a module of the architecture that was saved; only for one that is not this package's.
        check: whether another classifier is refused.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: as `purify_fast.methods.saved_defence.read_defence`; or a purifier is needed and not given.
    """

    def make(given: nn.Module, arguments: dict[str, Any]) -> Atop:
        facts = arguments["purifier"]
        made = purifier
        if made is None:
            if facts["kind"] not in PURIFIERS:
                raise ValueError(f"purifier: {folder} holds a {facts['kind']} of yours: give a module of its kind")
            made = PURIFIERS[facts["kind"]](**facts["arguments"])
        elif _text(description(made)) != _text(facts):
            raise ValueError(f"purifier: {folder} holds {_named(facts)}, got {_named(description(made))}")
        return Atop(given, made, **{name: value for name, value in arguments.items() if name != "purifier"})

    return read_defence(make, "Atop", folder, classifier, check)


def _text(facts: dict[str, Any]) -> str:
    # As JSON, because a file has lists where a module may have tuples.
    return json.dumps(facts, sort_keys=True)


def _named(facts: dict[str, Any]) -> str:
    sizes = facts["arguments"] or {}
    return f"{facts['kind']}({', '.join(f'{name}={value!r}' for name, value in sorted(sizes.items()))})"
