"""Signatures for functions whose options are the fields of dataclasses."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from dataclasses import fields
from typing import get_type_hints


def parameters_of(*kinds: type) -> dict[str, inspect.Parameter]:
    """Return the fields of dataclasses as keyword parameters, by name; the first field of a name is used."""
    found: dict[str, inspect.Parameter] = {}
    for kind in reversed(kinds):
        types = get_type_hints(kind)
        for each in fields(kind):
            keyword = inspect.Parameter.KEYWORD_ONLY
            found[each.name] = inspect.Parameter(each.name, keyword, default=each.default, annotation=types[each.name])
    return found


def check_names(what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse options with unknown names.

    Args:
        what: the name of the class or function that takes the options.
        given: the names of the options that a caller gave.
        allowed: the names that exist.

    Raises:
        TypeError: an unknown name. The message lists similar allowed names, or all names if none is similar.
    """
    allowed = sorted(allowed)
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed)
            hint = f"the nearest names are {', '.join(near)}" if near else f"allowed are {', '.join(allowed)}"
            raise TypeError(f"{what} has no option {name!r}: {hint}")
