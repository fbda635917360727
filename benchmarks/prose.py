"""Pages whose sentences are a template, and whose tables and numbers are filled in."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

#: The longest line of prose.
WIDTH = 120
#: Lines that mean something else when they are broken: tables, headings, comments, pictures, and code that is indented.
_WHOLE = re.compile(r"\||#|<|!\[| {4}")
#: Spaces before words that would begin an item of a list or a heading at the start of a line.
_GLUED = re.compile(r" (?=(?:[-+*#]|\d+[.)]) )")


def wrapped(text: str) -> str:
    """Break the lines of prose in a page of Markdown at `WIDTH`."""
    lines, in_code = list[str](), False
    for line in text.split("\n"):
        in_code ^= line.startswith("```")
        if in_code or len(line) <= WIDTH or _WHOLE.match(line):
            lines.append(line)
            continue
        mark = re.match(r"\s*(?:[-*]|\d+\.)? *", line)[0]  # type: ignore[index]
        glued = mark + _GLUED.sub("\0", line[len(mark) :])
        indent = " " * len(mark)
        broken = textwrap.wrap(glued, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines += [each.replace("\0", " ") for each in broken]
    return "\n".join(lines)


def rendered(template: Path, functions: Sequence[Callable] = (), **values: Any) -> str:
    """Fill a template; more than one blank line in a row becomes one.

    Args:
        template: the file of the template.
        functions: functions that it calls by their names.
        values: its variables; a variable that is missing is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["paragraph"] = lambda text: " ".join(text.split())
    environment.globals |= {function.__name__: function for function in functions}
    text = environment.get_template(template.name).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
