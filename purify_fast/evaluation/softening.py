"""Gradients through what hardens a model, without its cooperation: thresholds, masks, rounding, gates, detached parts.

The functions of PyTorch are replaced while the model's own code runs. A comparison returns the bool tensor that it
always returns, and a floating-point counterpart is kept beside it: a smooth step of the difference. Where the mask
takes part in arithmetic, the same is computed with the counterpart, and that has a gradient (Bengio et al., arXiv
1308.3432, call the estimator that keeps the hard values straight-through). What is not known here runs as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from math import isinf, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softsign
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

#: Raised whenever a softened model would compute something else: kept rows of one are used again by this number.
REVISION = 1
#: The slope of a comparison, in units of the size of what is compared: where values stay exact, and at temperature 1.
#: It falls with the root of the temperature: ten times lower slopes find little.
EXACT_SLOPE, SOFT_SLOPE = 30.0, 100.0

#: Functions whose first argument is divided by the temperature: they saturate.
_SATURATING = {
    "sigmoid", "expit", "special_expit", "logsigmoid", "hardsigmoid", "tanh", "hardtanh", "softmax", "log_softmax",
}  # fmt: skip
#: Functions with a gradient of zero, everywhere or outside of a range; the identity's gradient takes its place.
_FLAT = {
    "round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside", "hardshrink",
    "fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine",
}  # fmt: skip
#: All of these, and those that are flat with some arguments alone, as `_is_flat` tells.
_SOFTENED = _SATURATING | _FLAT | {"clamp", "threshold"}
#: Comparisons: whether the first argument is to be the larger one.
_COMPARISONS = dict.fromkeys(("gt", "ge", "greater", "greater_equal"), 1) | dict.fromkeys(
    ("lt", "le", "less", "less_equal"), -1
)
#: Functions that only change a type; between a floating-point one and others they round.
_CASTS = {
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "bool", "byte", "char", "short", "int", "long",
    "quantize_per_tensor", "quantize_per_channel", "dequantize",
}  # fmt: skip
#: Functions that do to the counterpart of their first argument what they do to it.
_SHAPES = {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as",
    "broadcast_to", "permute", "transpose", "t", "movedim", "repeat", "tile", "select", "narrow", "flip", "roll",
    "contiguous", "clone", "getitem",
}  # fmt: skip
#: Functions that are computed with the counterparts in place of all arguments that have one.
_ARITHMETIC = {
    "mul", "multiply", "add", "sub", "subtract", "rsub", "div", "divide", "true_divide", "rdiv", "neg", "sum", "mean",
    "cumsum", "cat", "concat", "stack", "matmul",
}  # fmt: skip
#: Functions of counterparts in place of masks.
_OF_MASKS: dict[str, Callable[..., Any]] = {
    "where": lambda mask, a, b: mask * a + (1 - mask) * b,
    "masked_fill": lambda x, mask, value: mask * value + (1 - mask) * x,
    "and": lambda p, q: p * q,
    "or": lambda p, q: p + q - p * q,
    "not": lambda p: 1 - p,
    "any": torch.amax,
    "all": torch.amin,
}
#: Functions of which counterparts may be arguments, and that have a form in place.
_OF_COUNTERPARTS = {*_ARITHMETIC, *_OF_MASKS, "scatter"}
#: Other names of the same functions, in the names that a `Softening` makes of theirs.
_SPELLINGS = {"invert": "not", "clip": "clamp", "iand": "and_", "ior": "or_"}
#: What is raised where a formula was not written for what it is given, which then stays as it is.
_UNKNOWN = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
#: Which argument of a choice among values says along which dimension, and where the indices are in its result.
_CHOICES = {"argmax": (1, None), "max": (1, 1), "topk": (2, 1), "sort": (1, 1), "argsort": (1, None)}


class Softening(TorchFunctionMode):
    """Within the block, what hardens a model lets gradients pass.

    Args:
        temperature: what the arguments of saturating functions are divided by, and with them the slope of comparisons;
            None: every value stays what it is.
    """

    def __init__(self, temperature: float | None):
        super().__init__()
        self.temperature = temperature
        self.slope = EXACT_SLOPE if temperature is None else SOFT_SLOPE / sqrt(temperature)
        # of a tensor that is not floating-point: its version when it was made, and its counterpart; or, of indices of
        # the largest values, what they choose from, and along which dimension
        self.beside: Any = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = _plain_name(func), kwargs or {}
        if name == "set_grad_enabled":
            # a block without gradients inside the model; whether there are any at all is decided outside of it
            return None
        first: Any = args[0] if args else None
        if name == "detach":
            return first
        known = any(map(self._known, args))
        with contextlib.suppress(*_UNKNOWN):
            if name == "setitem" and known:
                return self._set(func, *args)
            if name[:-1] in _SOFTENED | (_OF_COUNTERPARTS if known else set()) and name.endswith("_"):
                # an operation in place changes its argument, which the model goes on with
                before = first.clone()
                self._keep(before, self._kept(first, Tensor))
                after = self.__torch_function__(_not_in_place(func), types, (before, *args[1:]), kwargs)
                first.copy_(after)
                self._keep(first, self._kept(after, Tensor))
                return first
        if name in _SATURATING and self.temperature is not None and _floating(first):
            return func(first / self.temperature, *args[1:], **kwargs)
        hard = func(*args, **kwargs)
        if name in _CHOICES and _floating(first):
            self._choose(name, hard, args, kwargs)
        if isinstance(hard, Tensor):
            with contextlib.suppress(*_UNKNOWN):
                return self._followed(name, func, hard, args, kwargs)
        return hard

    def _followed(
        self, name: str, func: Callable[..., Any], hard: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """What a function returned, with a gradient, or with a counterpart beside it."""
        first: Any = args[0] if args else None
        if _is_flat(name, *args[1:], **kwargs) and _floating(first):
            return _straight(hard, first)
        if name in _COMPARISONS and len(args) == 2:
            a, b = map(self._or_itself, args)
            self._keep(hard, self._compared(a, b, _COMPARISONS[name]))
        elif name in _CASTS and _floating(first):
            if not (_floating(hard) or hard.dtype == torch.bool):
                values = hard.dequantize() if hard.is_quantized else hard.to(first.dtype)
                self._keep(hard, _straight(values, first))
        elif name in _CASTS:
            return self._soft(hard, self._kept(first, Tensor))
        elif name in ("scatter", "one_hot"):
            index, value = (first, None) if name == "one_hot" else (args[2], [*args[3:], *kwargs.values()])
            choice = self._kept(index, tuple)
            return hard if choice is None else self._soft(hard, self._scattered(first, index, choice, value))
        elif name in _SHAPES:
            choice, soft = self._kept(first, tuple), self._kept(first, Tensor)
            if choice is not None and hard.dim() == first.dim():
                self.beside[hard] = hard._version, choice
            return hard if soft is None else self._soft(hard, func(soft, *args[1:], **kwargs))
        elif any(map(self._known, args)) and not any(isinstance(each, float) and isinf(each) for each in args):
            # arithmetic with an infinity, such as that of what is masked out of a softmax, has no softened form
            rule = func if name in _ARITHMETIC else _OF_MASKS.get(name)
            if name == "where" and _floating(first):
                # x.where(mask, other)
                args = (args[1], first, *args[2:])
            return hard if rule is None else self._soft(hard, rule(*map(self._or_itself, args), **kwargs))
        return hard

    # -- counterparts -------------------------------------------------------------------------------------------------

    def _keep(self, hard: Tensor, soft: Tensor | None) -> None:
        """Keep the counterpart of a tensor without gradients, if it depends on the images."""
        if soft is not None and soft.requires_grad:
            self.beside[hard] = hard._version, soft

    def _kept(self, value: Any, kind: Any = (Tensor, tuple)) -> Any:
        """What is kept of a tensor, if it is of a kind; None where there is nothing, or the tensor changed since."""
        if not isinstance(value, Tensor) or value.is_floating_point():
            return None
        version, kept = self.beside.get(value, (None, None))
        return kept if isinstance(kept, kind) and value._version == version else None

    def _known(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(self._known, value))
        return self._kept(value) is not None

    def _or_itself(self, value: Any) -> Any:
        """What takes an argument's place in a formula: its counterpart, or the value as a number."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._or_itself, value))
        soft = self._kept(value, Tensor)
        if soft is None and isinstance(value, Tensor) and value.dtype == torch.bool:
            return value.float()
        return value if soft is None else soft

    def _soft(self, hard: Tensor, soft: Tensor | None) -> Tensor:
        """The result of a function, of which a softened form is known."""
        if soft is None or soft.shape != hard.shape:
            return hard
        if not _floating(hard):
            self._keep(hard, soft)
            return hard
        return _straight(hard, soft) if self.temperature is None else soft.to(hard.dtype)

    # -- what hardens -------------------------------------------------------------------------------------------------

    def _compared(self, a: Any, b: Any, sign: int = 1) -> Tensor | None:
        """The softened form of ``a > b``, or of ``a < b``."""
        difference = sign * (a - b) if _floating(a) or _floating(b) else None
        if difference is None or not difference.requires_grad:
            return None
        size = (abs(a) + abs(b)).detach()
        if size.dim() > 1:
            # of each image, or of whatever stands first
            size = size.flatten(1).mean(1).view(-1, *[1] * (size.dim() - 1))
        # its gradient vanishes nowhere, as a sigmoid's does far from the threshold
        return 0.5 + 0.5 * softsign(self.slope * difference / size.clamp_min(torch.finfo(size.dtype).tiny))

    def _choose(self, name: str, hard: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what indices of the largest values choose from."""
        at, place = _CHOICES[name]
        dim = args[at] if len(args) > at else kwargs.get("dim", None if "max" in name else -1)
        smallest = name == "topk" and kwargs.get("largest") is False
        if isinstance(dim, int) and not isinstance(dim, bool) and not smallest:
            index = hard if place is None else hard[place]
            self.beside[index] = index._version, (args[0], dim)

    def _scattered(
        self, x: Tensor, index: Tensor, choice: tuple[Tensor, int], value: list[Any] | None
    ) -> Tensor | None:
        """The softened form of ``one_hot(index)``, or of ``x.scatter(dim, index, value)``, for the largest values."""
        source, dim = choice
        least = source.gather(dim, index if index.dim() == source.dim() else index.unsqueeze(dim))
        soft = self._compared(source, least.amin(dim, keepdim=True))
        if soft is None or value is None:
            return None if soft is None else soft.movedim(dim, -1)
        alone = len(value) == 1 and _is_number(value[0])
        return soft * value[0] + (1 - soft) * self._or_itself(x) if alone else None

    def _set(self, func: Callable[..., Any], x: Tensor, index: Any, value: Any) -> None:
        """``x[mask] = value``."""
        mask, before = self._kept(index, Tensor), x.clone()
        func(x, index, value)
        if mask is not None and _is_number(value) and mask.shape == x.shape[: mask.dim()] and _floating(x):
            mask = mask.view(*mask.shape, *[1] * (x.dim() - mask.dim()))
            x.copy_(self._soft(x.clone(), mask * value + (1 - mask) * before))


def _not_in_place(func: Callable[..., Any]) -> Callable[..., Any]:
    """The form of an operation in place that returns its result."""
    name = func.__name__.strip("_")
    name = {"iand": "bitwise_and", "ior": "bitwise_or"}.get(name, name)
    return getattr(torch, name, None) or getattr(torch.nn.functional, name)


def _plain_name(func: Callable[..., Any]) -> str:
    """The name of a function without what tells operators, private and logical ones apart; ``_`` if it is in place."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    name = name.strip("_").removeprefix("logical_").removeprefix("bitwise_")
    return _SPELLINGS.get(name, name) + "_" * in_place


def _is_flat(name: str, /, *bounds: Any, **named: Any) -> bool:
    """Whether a function has no gradient somewhere, and is no ReLU or the guard of a division."""
    given = [each for each in (*bounds, *named.values()) if each is not None]
    return name in _FLAT or (name == "clamp" and len(given) == 2) or (name == "threshold" and 0 not in given[:1])


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinf(value)


def _straight(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of one tensor, the gradient of another."""
    return soft + (hard - soft).detach()
