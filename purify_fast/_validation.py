"""The allowed names of arguments that several packages share, and checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

#: The norms in which the size of a perturbation is measured.
Norm = Literal["linf", "l2", "l1"]
#: The norms that public functions accept. "Linf", "L2" and "L1" are the names in AutoAttack and RobustBench.
NormName = Literal["linf", "l2", "l1", "Linf", "L2", "L1"]
#: The precision of a training. "tf32" rounds products' factors to ten bits of mantissa. "auto" is bfloat16 where the
#: processor or card multiplies faster in it, or else float32.
Precision = Literal["float32", "tf32", "bfloat16", "auto"]
#: The unit of a training's delays.
DelayUnit = Literal["epochs", "steps", "images"]
#: The precision of an attack's gradients; see `purify_fast.attacks.gradient_copy`.
GradientPrecision = Literal["auto", "float32", "bfloat16"]
#: The use of CUDA graphs for steps of attacks; see `purify_fast.speed.StepGraphs`.
CudaGraphs = Literal["auto", "always", "off"]
#: The choice of cuDNN's algorithms; see `purify_fast.speed.precision.raced_convolutions`.
CudnnBenchmark = Literal["auto", "on", "off"]

#: For each type of a field: the class of the allowed values, and the words for this class in messages. A bool does not
#: count as a number, although bool is a subclass of int in Python.
_KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a string"),
}
#: The name, the type and the default of the fields, by class. torch.compile may trace a step that makes a config. It
#: can trace a look-up in a dictionary, but it cannot trace `get_type_hints` or `functools.cache`.
_types_of: dict[type, list[tuple[str, Any, Any]]] = {}


@dataclass(frozen=True)
class Range:
    """The allowed numbers of a field, as a part of its type: ``Annotated[float, Range(0, 1)]``."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    unit: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise a ValueError if ``value`` is outside the range or NaN; ``name`` is its name in the message."""
        if value is None:
            raise ValueError(f"{name} must be a number, got None")
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
#: A whole number of at least 1, such as a number of steps.
Count = Annotated[int, Range(1)]
_COUNTS = (Count, Count | None)
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, below=True)]


def check_counts(**counts: Any) -> None:
    """Raise a ValueError unless every argument, named by its keyword, is a whole number of at least 1, or None."""
    for name, value in counts.items():
        _check_type(name, value, Count | None)


def in_one_line(error: BaseException) -> str:
    """The kind of an error, and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def check_number(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value``, the argument called ``name``, is a number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, such as 8 / 255, got {value!r}")


def read_norm(norm: str, allowed: Sequence[str] = get_args(Norm)) -> Norm:
    """Convert the name of a norm to this package's spelling, such as ``linf``."""
    name = norm.lower().replace("-", "").replace("_", "") if isinstance(norm, str) else norm
    if name not in allowed:
        raise ValueError(f"norm must be one of {', '.join(allowed)}, got {norm!r} (upper case too, as in Linf)")
    return cast(Norm, name)


def check_literal(name: str, value: Any, literal: Any) -> None:
    """Raise a ValueError unless ``value`` is one of the values of ``literal``, a ``typing.Literal`` type."""
    allowed = get_args(literal)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def check_types(config: Any) -> None:
    """Raise a ValueError if a field of a dataclass does not have the type and the `Range` of its annotation."""
    if type(config) not in _types_of:
        hints = get_type_hints(type(config), include_extras=True)
        _types_of[type(config)] = [(field.name, hints[field.name], field.default) for field in fields(config)]
    for name, kind, default in _types_of[type(config)]:
        value = getattr(config, name)
        # Every attack runs this loop. A default needs no check, and most other values are truth values and counts.
        if value is default or (kind is bool and isinstance(value, bool)):
            continue
        if kind in _COUNTS and type(value) is int and value >= 1:
            continue
        _check_type(name, value, kind)


def _check_type(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) in (Union, UnionType):
        others = [item for item in get_args(kind) if item is not type(None)]
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
        for item in value:
            _check_type(f"each of {name}", item, kinds[0])
    elif is_dataclass(kind):
        if not isinstance(value, kind):  # type: ignore[arg-type]
            raise ValueError(f"{name} must be an object of {kind.__name__}, got {value!r}")  # type: ignore[union-attr]
    elif kind in _KINDS:
        type_, words = _KINDS[kind]
        if not isinstance(value, type_) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} must be {words}, got {value!r}")
