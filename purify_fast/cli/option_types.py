"""How the values of options are read, where that differs from tyro's own way.

- Numbers may be fractions: ``--eps 8/255``.
- The choice among words is left to the configuration that holds it, whose message names the option and what is
  allowed. Norms are also taken as other packages write them, ``--norm Linf``.
- A configuration that refuses its values is reported in its own words, without the parser's names for its parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, get_args, get_origin

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
)


class Refused(Exception):
    """A configuration does not accept its values. No ValueError: the parser would wrap that in words of its own."""


def number(text: str) -> float:
    """A number, or a fraction of two numbers such as ``8/255``.

    Args:
        text: what was given.

    Raises:
        ValueError: it is neither.
    """
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"must be a number or a fraction such as 8/255, got {text!r}") from error


def check_radius(eps: float, norm: str) -> None:
    """ValueError for a radius that is 0, or no share of the range of image values.

    Args:
        eps: the radius in image units.
        norm: its norm; only the values of "linf" are bounded.
    """
    if eps == 0:
        raise ValueError("--eps must be above 0, got 0: no image could be moved. Give a radius, such as 8/255")
    if norm == "linf" and eps > 1:
        raise ValueError(f"eps is in image units, at most 1 for linf, got {eps:g}: is {eps:g}/255 meant?")


def _fractions(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type is not float:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda words: number(words[0]),
        is_instance=lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
        str_from_instance=lambda value: [f"{value:.6g}" if value == float(f"{value:.6g}") else str(value)],
    )


def _words(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if get_origin(info.type) is not Literal or not all(isinstance(word, str) for word in get_args(info.type)):
        return None
    allowed = get_args(info.type)

    def read(words: list[str]) -> str:
        plain = words[0].lower().replace("-", "")
        return plain if plain in allowed and plain in ("linf", "l2", "l1") else words[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(allowed) + "}",
        instance_from_str=read,
        is_instance=lambda value: value in allowed,
        str_from_instance=lambda value: [value],
    )


class _Own:
    """The rule for dataclasses: built as tyro does, but refusing in their own words."""

    def __init__(self) -> None:
        self.asking = False

    def __call__(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        if self.asking or not dataclasses.is_dataclass(info.type):
            return None
        # tyro's own rule is asked through the registry, which would come back here
        self.asking = True
        try:
            found = ConstructorRegistry.get_struct_spec(info)
        finally:
            self.asking = False
        if not isinstance(found, StructConstructorSpec):
            return None
        return dataclasses.replace(found, instantiate=_refusing(found.instantiate))


def _refusing(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        try:
            return make(*args, **kwargs)
        except ValueError as error:
            raise Refused(str(error)) from error

    return made


def option_types() -> ConstructorRegistry:
    """The rules, for ``tyro.cli(registry=...)``."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_fractions)
    registry.primitive_rule(_words)
    registry.struct_rule(_Own())
    return registry
