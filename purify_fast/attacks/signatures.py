"""Signatures and docstrings for functions whose options are the fields of dataclasses."""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import fields
from typing import get_type_hints

#: The width to which docstrings are wrapped, in columns.
WIDTH = 116


def parameters_of(*kinds: type) -> dict[str, inspect.Parameter]:
    """Return the fields of dataclasses as keyword parameters, by name; the first field of a name is used."""
    found: dict[str, inspect.Parameter] = {}
    for kind in reversed(kinds):
        types = get_type_hints(kind)
        for each in fields(kind):
            keyword = inspect.Parameter.KEYWORD_ONLY
            found[each.name] = inspect.Parameter(each.name, keyword, default=each.default, annotation=types[each.name])
    return found


def texts_of(*kinds: type) -> dict[str, str]:
    """The entries in the "Args:" sections of classes and their bases, by name; a class overrides its bases."""
    found: dict[str, str] = {}
    for each in (base for kind in reversed(kinds) for base in reversed(kind.__mro__)):
        # Docstrings are missing under python -OO.
        section = inspect.cleandoc(each.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
        name = ""
        for line in section.splitlines():
            if line.startswith(" " * 5):
                found[name] += f" {line.strip()}"
            else:
                name, _, text = line.strip().partition(": ")
                found[name] = text
    return found


def docstring(summary: str, **sections: Iterable[str]) -> str:
    """Make a docstring from a summary and from sections, such as ``Args``, with their entries."""
    blocks = [summary]
    for title, texts in sections.items():
        # An entry's further lines are indented more than its first, except in "Returns", whose entries have no names.
        further = " " * (4 if title == "Returns" else 8)
        entries = (textwrap.fill(text, WIDTH, initial_indent=" " * 4, subsequent_indent=further) for text in texts)
        blocks.append("\n".join([f"{title}:", *entries]))
    return "\n\n".join(blocks)


def check_names(what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse options with unknown names."""
    allowed = sorted(allowed)
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed) or allowed
            raise TypeError(f"{what} has no option {name!r}: try {', '.join(near)}")
