"""The signature and the docstring of a function whose options are the fields of dataclasses."""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple, get_type_hints

#: Columns of a docstring.
WIDTH = 116


class Option(NamedTuple):
    """An option of a function.

    Args:
        annotation: the type.
        text: the entry of the docstring.
        default: the value that is taken if the caller gives none; ``inspect.Parameter.empty`` if the caller must.
    """

    annotation: Any
    text: str
    default: Any = inspect.Parameter.empty


def entries(docstring: str | None) -> dict[str, str]:
    """The text of each entry in the "Args:" section of a docstring, by name; empty without such a section."""
    found: dict[str, str] = {}
    name, lines = "", inspect.cleandoc(docstring or "").splitlines()
    for line in lines[lines.index("Args:") + 1 :] if "Args:" in lines else ():
        if not line:
            break
        if line.startswith(" " * 5):
            found[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            found[name] = text
    return found


def options_of(kind: type) -> dict[str, Option]:
    """The fields of a dataclass as options, by name; the entry of a subclass replaces that of its base."""
    types = get_type_hints(kind)
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        texts |= entries(vars(base).get("__doc__"))
    found = {}
    for each in fields(kind):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        # docstrings are missing under python -OO
        found[each.name] = Option(types[each.name], texts.get(each.name, ""), default)
    return found


def describe(
    function: Callable[..., Any],
    options: Mapping[str, Option],
    returned: Any,
    summary: str,
    sections: Mapping[str, Iterable[str]],
) -> None:
    """Give a function the signature and the docstring that its options make.

    Args:
        function: it takes ``**options``; it is changed.
        options: its parameters in order. Those that it names itself are positional, and the others are keywords.
        returned: the type of its result.
        summary: the docstring in front of the parameters.
        sections: the entries of the sections behind the parameters, by title.
    """
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    kinds = {name: inspect.Parameter.POSITIONAL_OR_KEYWORD for name in positional}
    parameters = [
        inspect.Parameter(
            name, kinds.get(name, inspect.Parameter.KEYWORD_ONLY), default=each.default, annotation=each.annotation
        )
        for name, each in options.items()
    ]
    function.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    function.__annotations__ = {name: each.annotation for name, each in options.items()} | {"return": returned}
    blocks = [summary]
    for title, texts in ({"Args": [f"{name}: {each.text}" for name, each in options.items()]} | dict(sections)).items():
        blocks.append("\n".join([f"{title}:", *(_entry(text, hanging=title != "Returns") for text in texts)]))
    function.__doc__ = "\n\n".join(blocks)


def _entry(text: str, hanging: bool) -> str:
    """An entry of a section, indented; its further lines are indented more if it begins with a name."""
    indent, further = " " * 4, " " * (8 if hanging else 4)
    lines = textwrap.wrap(text, WIDTH - len(further), break_long_words=False, break_on_hyphens=False)
    return indent + f"\n{further}".join(lines)


def check_names(what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse options with unknown names.

    Args:
        what: the name of what takes the options.
        given: the names of the options that a caller gave.
        allowed: the names that exist.

    Raises:
        TypeError: an unknown name; the message has the nearest allowed ones, or all of them if none is near.
    """
    allowed = sorted(allowed)
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed)
            hint = f"the nearest names are {', '.join(near)}" if near else f"allowed are {', '.join(allowed)}"
            raise TypeError(f"{what} has no option {name!r}: {hint}")
