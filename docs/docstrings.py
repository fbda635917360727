"""Docstrings are written for editors and terminals; here they become what Sphinx reads."""

from __future__ import annotations

import re

#: Code between backticks, which stays as it is.
_CODE = re.compile(r"(``.+?``|`[^`]+`)")


def to_rst(app, what, name, obj, options, lines):
    """Escape what reStructuredText would take for markup: ``|cos|``, ``*args``, ``name_``.

    Args:
        app: of Sphinx, as the other arguments.
        what: the kind of the object.
        name: its full name.
        obj: the object.
        options: of the directive.
        lines: the docstring, changed in place.
    """
    lines[:] = [_escaped(line) for line in lines]


def keep_returns_whole(app, what, name, obj, options, lines):
    """The first words of a "Returns:" section are no type, though a colon follows them; signatures have the types.

    Args:
        app: of Sphinx, as the other arguments.
        what: the kind of the object.
        name: its full name.
        obj: the object.
        options: of the directive.
        lines: the docstring, changed in place.
    """
    for i, line in enumerate(lines[1:], 1):
        if lines[i - 1].strip() in ("Returns:", "Yields:") and line.strip():
            indent = len(line) - len(line.lstrip())
            lines[i] = f"{line[:indent]}: {line[indent:]}"


def _escaped(line):
    parts = _CODE.split(line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<!\\)([|*])", r"\\\1", parts[i])
        parts[i] = re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", parts[i])
    return "".join(parts)
