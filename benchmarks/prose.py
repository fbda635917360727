"""Pages whose sentences are a template, and whose tables and numbers are filled in."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2


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
