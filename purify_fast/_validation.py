"""The names that arguments of several packages take, and checks, whose errors say what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

#: The norms of a ball.
Norm = Literal["linf", "l2", "l1"]
#: The norms that public functions take. AutoAttack and RobustBench spell them as in the second half.
NormName = Literal["linf", "l2", "l1", "Linf", "L2", "L1"]
#: The precision of a training or an evaluation. With "tf32" a GPU rounds the factors of products to ten bits of
#: mantissa.
Precision = Literal["float32", "tf32", "bfloat16"]
#: The precision of an attack's gradients; see `purify_fast.attacks.gradient_copy`.
GradientPrecision = Literal["auto", "float32", "bfloat16"]
#: The use of CUDA graphs for steps of attacks; see `purify_fast.speed.StepGraphs`.
CudaGraphs = Literal["auto", "always", "off"]
#: The choice of cuDNN's algorithms; see `purify_fast.speed.precision.raced_convolutions`.
CudnnBenchmark = Literal["auto", "on", "off"]

#: For each type of a field: the class of its values, and the words for it in messages. A bool is not a number here,
#: although Python takes it for one.
_KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a string"),
}
#: The types of the fields, by class. This is a plain dictionary, because torch.compile may trace a step that makes a
#: config. It can trace a look-up in a dictionary, but neither `get_type_hints` nor a `functools.cache`.
_types_of: dict[type, dict[str, Any]] = {}


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold, as a part of its type: ``Annotated[float, Range(0, 1)]``.

    Args:
        low: the least.
        high: the most; infinity for no bound.
        above: whether the value must be above ``low``.
        below: whether the value must be below ``high``; below infinity it is finite.
        unit: text that the message adds behind the bounds.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    unit: str = ""

    def check(self, name: str, value: Any) -> None:
        """ValueError unless ``value``, called ``name``, is in the range; NaN is in none."""
        high_enough = value > self.low if self.above else value >= self.low
        if high_enough and (value < self.high if self.below else value <= self.high):
            return
        if self.high < math.inf:
            words = f"in {'(' if self.above else '['}{self.low:.10g}, {self.high:.10g}{')' if self.below else ']'}"
        else:
            words = f"{'above' if self.above else 'at least'} {self.low:.10g}{' and finite' if self.below else ''}"
        raise ValueError(f"{name} must be {words}{self.unit}, got {value}")


AtLeast0 = Annotated[float, Range(0)]
#: A finite number above 0, such as a learning rate or the length of a step.
Positive = Annotated[float, Range(0, above=True, below=True)]
#: A number of things, such as steps: at least 1.
Count = Annotated[int, Range(1)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, below=True)]


def check_counts(**counts: Any) -> None:
    """ValueError unless each argument, by its name, is a whole number of at least 1."""
    for name, value in counts.items():
        _check_type(name, value, Count)


def check_number(name: str, value: Any) -> None:
    """TypeError unless the argument ``name`` is a number; a fraction in quotes is written out."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return
    got, hint = repr(value), ""
    if isinstance(value, str) and re.fullmatch(r"\s*[\d.]+\s*/\s*[\d.]+\s*", value):
        hint = f": write {' / '.join(part.strip() for part in value.split('/'))} without quotes"
    elif (shape := getattr(value, "shape", None)) is not None:
        got = f"{type(value).__module__}.{type(value).__name__} {list(shape)}"
        hint = f": float({name}) makes a number" if math.prod(shape) == 1 else ""
    raise TypeError(f"{name} must be a number, such as 8 / 255, got {got}{hint}")


def read_norm(norm: str, allowed: Sequence[str] = get_args(Norm)) -> Norm:
    """A norm's name as this package writes it.

    Args:
        norm: the name in upper or lower case, with or without ``-`` or ``_``: ``Linf``, ``L-inf`` and ``l_inf`` mean
            ``linf``.
        allowed: the norms that the caller takes, as this package writes them.

    Raises:
        ValueError: another name.
    """
    known = norm.lower().replace("-", "").replace("_", "") if isinstance(norm, str) else norm
    if known not in allowed:
        raise ValueError(
            f"norm must be one of {', '.join(allowed)}, got {norm!r} (upper case means the same, as in Linf)"
        )
    return cast(Norm, known)


def check_literal(name: str, value: Any, literal: Any) -> None:
    """ValueError unless ``value`` is one of the strings of ``literal``, a ``typing.Literal`` type."""
    allowed = get_args(literal)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def check_types(config: Any) -> None:
    """ValueError unless each field of a dataclass has a value of the type, and in the `Range`, of its annotation.

    Python itself checks no annotation: the string "5" or the number 2.5 in place of 5 could end a training hours later.

    Args:
        config: the dataclass. Fields that are bool, int, float, str, a ``typing.Literal``, a dataclass, a tuple of
            these, or None are checked, and others are not.
    """
    if type(config) not in _types_of:
        _types_of[type(config)] = get_type_hints(type(config), include_extras=True)
    for name, kind in _types_of[type(config)].items():
        _check_type(name, getattr(config, name), kind)


def _check_type(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) in (Union, UnionType):
        others = [one for one in get_args(kind) if one is not type(None)]
        # A field with several types is not checked. An optional field is checked unless its value is None.
        if (value is None and type(None) in get_args(kind)) or len(others) > 1:
            return
        kind = others[0]
    if get_origin(kind) is Annotated:
        kind, *bounds = get_args(kind)
        _check_type(name, value, kind)
        for bound in bounds:
            if isinstance(bound, Range):
                bound.check(name, value)
    elif get_origin(kind) is Literal:
        check_literal(name, value, kind)
    elif get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name} must be a tuple, got {value!r}")
        kinds = get_args(kind)
        if kinds[-1] is not Ellipsis and len(value) != len(kinds):
            raise ValueError(f"{name} must have {len(kinds)} values, got {value!r}")
        for one in value:
            _check_type(f"each of {name}", one, kinds[0])
    elif is_dataclass(kind):
        if not isinstance(value, kind):  # type: ignore[arg-type]
            raise ValueError(f"{name} must be an object of {kind.__name__}, got {value!r}")  # type: ignore[union-attr]
    elif kind in _KINDS:
        type_, words = _KINDS[kind]
        if not isinstance(value, type_) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} must be {words}, got {value!r}")


def check_folder(name: str, path: str | Path | None) -> None:
    """ValueError if a folder is wanted and there is a file, or a file on the way to it; None is accepted.

    Args:
        name: name of the argument.
        path: its value.
    """
    if path is None:
        return
    for place in (Path(path), *Path(path).parents):
        # Call `exists` first: if another process creates the folder between the two calls, the other order would take
        # it for a file.
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{name} must be a folder, got {path}: {place} is a file")
            return


def check_shapes(what: str, shapes: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """Refuse missing, unknown or misshapen tensors.

    Args:
        what: how the error begins.
        shapes: the shape of each tensor, by its name.
        wanted: the wanted shape of each tensor, by its name.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; four of them at most are named.
    """
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - shapes.keys())]
    problems += [f"{name} is unknown" for name in sorted(shapes.keys() - wanted.keys())]
    problems += [
        f"{name} is {list(shapes[name])}, must be {list(wanted[name])}"
        for name in sorted(wanted.keys() & shapes.keys())
        if tuple(shapes[name]) != tuple(wanted[name])
    ]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:4])}{more}")
