"""Texts that are templates of jinja2, in files beside the modules that fill them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2


@functools.cache
def environment(package: str) -> jinja2.Environment:
    """The templates of a package; a variable that is missing is an error, and in HTML every text is escaped.

    Args:
        package: the package that the templates lie in.
    """
    # Imported here because jinja2 takes 0.05 seconds, for which the command line's --help should not wait.
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, ""),
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def render(package: str, template: str, **values: Any) -> str:
    """Render a template to text.

    Args:
        package: the package of the template.
        template: the file's name.
        values: variables of the template.
    """
    return environment(package).get_template(template).render(values)
