"""The functions of PyTorch that a softened model replaces, by name, and in which cases they have steps or are flat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .function_mode import Rule


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Functions that saturate. Their first argument is divided by the temperature.
SATURATING = _names("sigmoid expit special_expit logsigmoid hardsigmoid tanh softmax log_softmax")
#: Functions whose gradient is zero everywhere or outside of a range, and becomes that of the identity.
FLAT = _names(
    "round floor ceil trunc fix sign sgn heaviside hardshrink fake_quantize_per_tensor_affine "
    "fake_quantize_per_channel_affine"
)
#: Functions whose result has steps, for floating-point numbers or for integers, each with a smooth formula that gives
#: the gradient. A remainder has half of the identity's gradient, so that half arrives whether a model uses the
#: remainder or subtracts it.
STEPS: dict[str, Rule] = {
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a / b,
    "rfloordiv": lambda a, b: b / a,
    "remainder": lambda a, b: a / 2,
    "fmod": lambda a, b: a / 2,
    "frac": lambda a: a / 2,
    "rshift": lambda a, b: a / 2**b,
    "lshift": lambda a, b: a * 2**b,
    "clamp": lambda a, *bounds: a,
    "and": lambda *each: sum(value for value in each if follows(value)),
    "or": lambda *each: sum(value for value in each if follows(value)),
}
#: All functions that saturate or are flat, including those that are flat only for some arguments (see `is_flat`).
SOFTENED = SATURATING | FLAT | {"clamp", "hardtanh", "threshold"}
#: The names of comparisons. The value is 1 for "greater" and -1 for "less".
COMPARISONS = {
    **dict.fromkeys(("gt", "ge", "greater", "greater_equal"), 1),
    **dict.fromkeys(("lt", "le", "less", "less_equal"), -1),
}
#: Functions that only change the type. A change from a floating-point type to another type rounds.
CASTS = _names(
    "to type type_as float double half bfloat16 bool byte char short int long quantize_per_tensor "
    "quantize_per_channel dequantize"
)
#: Functions that only select or rearrange values. The counterpart of their first argument is changed in the same way.
SHAPES = _names(
    "view view_as reshape reshape_as flatten unflatten squeeze unsqueeze expand expand_as broadcast_to permute "
    "transpose t movedim repeat tile select narrow flip roll contiguous clone getitem"
)
#: Functions that are called a second time, with the counterparts of those arguments that have a counterpart.
ARITHMETIC = _names(
    "mul multiply add sub subtract rsub div divide true_divide rdiv neg sum mean cumsum cat concat stack matmul"
)
#: For each function of masks, the formula that is computed with the smooth counterparts of these masks.
OF_MASKS: dict[str, Rule] = {
    "where": lambda mask, a, b: mask * a + (1 - mask) * b,
    "masked_fill": lambda x, mask, value: mask * value + (1 - mask) * x,
    "and": lambda p, q: p * q,
    "or": lambda p, q: p + q - p * q,
    "not": lambda p: 1 - p,
    "any": torch.amax,
    "all": torch.amin,
}
#: For each function that reads values from a table: the positions of the table (None: no argument is the table) and of
#: the indices among its arguments.
LOOKUPS = {"getitem": (0, 1), "embedding": (1, 0), "index_select": (0, 2), "take": (0, 1), "one_hot": (None, 0)}
#: Functions that can be called with counterparts, and that have an in-place form, such as ``add_``.
OF_COUNTERPARTS = {*ARITHMETIC, *OF_MASKS, "scatter"}
#: Some functions have several names in PyTorch. The keys are such names, the values are the names that are used here.
_SPELLINGS = {
    "invert": "not",
    "clip": "clamp",
    "divide": "div",
    "floor_divide": "floordiv",
    "right_shift": "rshift",
    "left_shift": "lshift",
    "iand": "and_",
    "ior": "or_",
    "irshift": "rshift_",
    "ilshift": "lshift_",
}
#: Errors of a formula that was not written for its arguments. The result of the function is then not changed.
UNKNOWN = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
#: For each function that chooses among values: the position of its argument ``dim``, and the position of the indices in
#: its result (None: the result itself).
CHOICES: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("argmax", "argmin", "argsort"), (1, None)),
    **dict.fromkeys(("max", "min", "median", "sort"), (1, 1)),
    **dict.fromkeys(("kthvalue", "topk"), (2, 1)),
}
#: Functions that may select some of the indices of a choice. Their result is still a choice in the same dimension.
SLICES = {"getitem", "narrow", "contiguous", "clone"}


def not_in_place(func: Rule) -> Rule:
    """The out-of-place form of an in-place operation."""
    name = func.__name__.strip("_")
    name = {f"i{each}": f"bitwise_{each}" for each in ("and", "or")}.get(name, name)
    name = {"irshift": "bitwise_right_shift", "ilshift": "bitwise_left_shift"}.get(name, name)
    return getattr(torch, name, None) or getattr(torch.nn.functional, name)


def plain_name(func: Rule) -> str:
    """Return the name of a function without outer underscores and without the prefixes "logical_" and "bitwise_"."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    name = name.strip("_").removeprefix("logical_").removeprefix("bitwise_")
    return _SPELLINGS.get(name, name) + "_" * in_place


def is_flat(name: str, /, *bounds: Any, **named: Any) -> bool:
    """Tell whether a function has a range with gradient 0; a ReLU, or a clamp with one bound, does not count."""
    given = [each for each in (*bounds, *named.values()) if each is not None]
    return name in FLAT or (name == "clamp" and len(given) == 2) or (name == "threshold" and 0 not in given[:1])


def goes_in_steps(name: str, result: Any, **named: Any) -> bool:
    """Tell whether a function is in `STEPS` and has steps; some have steps only for integers or with an option."""
    whole = isinstance(result, Tensor) and not (result.is_floating_point() or result.dtype == torch.bool)
    return name in STEPS and (
        named.get("rounding_mode") is not None if name == "div" else whole or name not in ("clamp", "and", "or")
    )


def wider(temperature: float, x: Tensor, min_val: float = -1.0, max_val: float = 1.0, **_: Any) -> Tensor:
    """Apply ``hardtanh`` with a range whose width is multiplied by the temperature; its middle does not change."""
    middle, half = (max_val + min_val) / 2, (max_val - min_val) / 2
    return x.clamp(middle - temperature * half, middle + temperature * half)


def follows(value: Any) -> bool:
    """Tell whether a value is a tensor through which a gradient passes."""
    return isinstance(value, Tensor) and value.requires_grad
