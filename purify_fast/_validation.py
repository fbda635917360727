"""Checks of arguments that several modules share; each error names the argument, its value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args


def check_literal(name: str, value: Any, literal: Any) -> None:
    """ValueError unless ``value`` is one of the strings of ``literal``, a ``typing.Literal`` type."""
    allowed = get_args(literal)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def check_folder(name: str, path: str | Path | None) -> None:
    """ValueError if there is a file where a folder is wanted, or on the way to it; None is no folder.

    Args:
        name: of the argument.
        path: its value.
    """
    if path is None:
        return
    for place in (Path(path), *Path(path).parents):
        if place.is_dir():
            return
        if place.exists():
            raise ValueError(f"{name} must be a folder, got {path}: {place} is a file")
