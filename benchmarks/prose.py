"""Fill tables and numbers into templates of Markdown pages, and wrap long lines."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

#: The largest number of characters in a line of prose.
WIDTH = 120
#: The beginnings of lines that must not be broken: lines of tables, headings, comments, pictures, and indented code.
_WHOLE = re.compile(r"\||#|<|!\[| {4}")
#: The spaces at which a line must not be broken, because the next word would begin a list item or a heading.
_GLUED = re.compile(r" (?=(?:[-+*#]|\d+[.)]) )")


def wrapped(text: str) -> str:
    """Break long lines of prose in a Markdown page at `WIDTH` characters."""
    lines, in_code = list[str](), False
    for line in text.split("\n"):
        in_code ^= line.startswith("```")
        if in_code or len(line) <= WIDTH or _WHOLE.match(line):
            lines.append(line)
            continue
        mark = re.match(r"\s*(?:(?:[-*]|\d+\.) +)?", line)[0]  # type: ignore[index]
        glued = mark + _GLUED.sub("\0", line[len(mark) :])
        indent = " " * len(mark)
        broken = textwrap.wrap(glued, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines += [each.replace("\0", " ") for each in broken]
    return "\n".join(lines)


def rendered(template: Path, functions: Sequence[Callable] = (), **values: Any) -> str:
    """Fill a template, and return the page. Consecutive blank lines become one blank line."""
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
