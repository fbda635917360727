"""Checks of arguments that several modules share; each error names the argument, its value and what is allowed."""

from __future__ import annotations

from typing import Any, get_args


def check_literal(name: str, value: Any, literal: Any) -> None:
    """ValueError unless ``value`` is one of the strings of ``literal``, a ``typing.Literal`` type."""
    allowed = get_args(literal)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
