"""Texts that are templates of jinja2, in files beside the modules that fill them."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def render(package: str, template: str, **values: Any) -> str:
    """Render a template to text.

    Args:
        package: the package of the template.
        template: the file's name.
        values: variables of the template; a variable that is missing is an error.
    """
    # importing it takes 0.05 seconds, which the command line's --help does not need
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(files(package).joinpath(template).read_text(encoding="utf-8")).render(values)
