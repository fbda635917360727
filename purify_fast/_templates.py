"""Render the package's jinja2 templates, which are files beside the modules that use them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2


@functools.cache
def environment(package: str) -> jinja2.Environment:
    """The jinja2 environment of a package's templates."""
    # The import of jinja2 takes 0.05 seconds, and ``--help`` on the command line should not wait for it.
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, ""),
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def render(package: str, template: str, **values: Any) -> str:
    """Render a template to text."""
    return environment(package).get_template(template).render(values)
