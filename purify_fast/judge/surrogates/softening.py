"""Lets gradients pass through the thresholds, masks, rounding, gates and detached parts of any model.

Functions of PyTorch are replaced while the model's code runs. A comparison still returns its mask. In addition, a
smooth step of the difference is stored as the mask's counterpart. Arithmetic with the mask uses the counterpart for the
gradient. (An estimator that keeps the hard values is called straight-through, Bengio et al., arXiv 1308.3432.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from math import isinf, sqrt
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.functional import one_hot, pad, softsign
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..._tensors import per_image

#: A function of PyTorch, or a formula that replaces it.
Rule = Callable[..., Any]
Args = tuple[Any, ...]


# -- the functions of PyTorch that a softened model replaces, by name -------------------------------------------------


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
    "and": lambda *values: sum(value for value in values if follows(value)),
    "or": lambda *values: sum(value for value in values if follows(value)),
}
#: All functions that saturate or are flat, including those that are flat only for some arguments (see `is_flat`).
SOFTENED = SATURATING | FLAT | {"clamp", "hardtanh", "threshold"}
#: The names of comparisons. The value is 1 for "greater" and -1 for "less".
COMPARISONS = {"gt": 1, "ge": 1, "greater": 1, "greater_equal": 1, "lt": -1, "le": -1, "less": -1, "less_equal": -1}
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
_SPELLINGS = dict(
    pair.split(":")
    for pair in _names(
        "invert:not clip:clamp divide:div floor_divide:floordiv right_shift:rshift left_shift:lshift iand:and_ ior:or_ "
        "irshift:rshift_ ilshift:lshift_"
    )
)
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
    of_operators = {"iand": "and", "ior": "or", "irshift": "right_shift", "ilshift": "left_shift"}
    name = f"bitwise_{of_operators[name]}" if name in of_operators else name
    return getattr(torch, name, None) or getattr(torch.nn.functional, name)


def plain_name(func: Rule) -> str:
    """Return the name of a function without outer underscores and without the prefixes "logical_" and "bitwise_"."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    name = name.strip("_").removeprefix("logical_").removeprefix("bitwise_")
    return _SPELLINGS.get(name, name) + "_" * in_place


def is_flat(name: str, /, *bounds: Any, **named: Any) -> bool:
    """Return True if a function has a range with gradient 0; a ReLU, or a clamp with one bound, does not count."""
    values = [value for value in (*bounds, *named.values()) if value is not None]
    return name in FLAT or (name == "clamp" and len(values) == 2) or (name == "threshold" and 0 not in values[:1])


def goes_in_steps(name: str, result: Any, **named: Any) -> bool:
    """Return True if a function is in `STEPS` and has steps; some have steps only for integers or with an option."""
    if name in ("clamp", "and", "or"):
        return isinstance(result, Tensor) and not (result.is_floating_point() or result.dtype == torch.bool)
    return name in STEPS and (name != "div" or named.get("rounding_mode") is not None)


def wider(temperature: float, x: Tensor, min_val: float = -1.0, max_val: float = 1.0, **_: Any) -> Tensor:
    """Apply ``hardtanh`` with a range whose width is multiplied by the temperature; its middle does not change."""
    middle, half = (max_val + min_val) / 2, (max_val - min_val) / 2
    return x.clamp(middle - temperature * half, middle + temperature * half)


def follows(value: Any) -> TypeGuard[Tensor]:
    """Return True if a value is a tensor through which a gradient passes."""
    return isinstance(value, Tensor) and value.requires_grad


# -- the function modes -----------------------------------------------------------------------------------------------

#: A softened comparison is a smooth step of the difference divided by the size of the compared values. These numbers
#: are the slopes of the step. EXACT_SLOPE is used without a temperature, when only the gradients are softened.
#: SOFT_SLOPE is used at temperature 1; at another temperature it is divided by the root of the temperature. A larger
#: slope is closer to a hard threshold. With a tenth of these slopes, attacks find little.
EXACT_SLOPE, SOFT_SLOPE = 30.0, 100.0
#: The origin of a tensor of indices, such as a result of argmax. It is a pair (values, dim): the values among which the
#: indices were chosen, and the dimension of the choice. Or a pair (weights, None): the weights of all possible indices.
Choice = tuple[Tensor, int | None]


class HoldingMode(TorchFunctionMode):
    """A function mode that also enters another context, and that can be entered again inside its own block."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[contextlib.ExitStack] = []

    def held(self, stack: contextlib.ExitStack) -> None:
        """Enter the other context."""

    def __enter__(self) -> Any:
        stack = contextlib.ExitStack()
        self.held(stack)
        self._open.append(stack)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._open.pop().close()


class Softening(HoldingMode):
    """A function mode in which thresholds, rounding and similar functions have a useful gradient.

    ``temperature`` divides the arguments of functions that saturate; its root divides the slope of comparisons. With
    None, all values are exact, and only the gradients change.
    """

    def __init__(self, temperature: float | None):
        super().__init__()
        self.temperature = temperature
        self.slope = EXACT_SLOPE if temperature is None else SOFT_SLOPE / sqrt(temperature)
        # For tensors that are not floating-point: the tensor's version at the time of the entry, and its counterpart or
        # the `Choice` from which its indices come.
        self.beside: Any = WeakTensorKeyDictionary()

    def held(self, stack: contextlib.ExitStack) -> None:
        # Copies are kept for the backward pass, because the model may later overwrite a tensor that the gradient needs.
        kept = torch.autograd.graph.saved_tensors_hooks(lambda t: t if t.is_leaf else t.detach().clone(), lambda t: t)
        stack.enter_context(kept)

    def __torch_function__(self, func: Rule, types: Any, args: Args = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = plain_name(func), kwargs or {}
        self.let_through(args)
        if name == "set_grad_enabled":
            # A no_grad block inside the model is ignored, because it would hide gradients.
            return None
        first: Any = args[0] if args else None
        if name == "detach" or func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return first
        if name in ("numpy", "array") and _floating(first):
            return func(first.detach(), *args[1:], **kwargs)
        soft = any(map(self._known, args))
        if kwargs.get("inplace") and name in SOFTENED:
            name, kwargs = name + "_", {key: value for key, value in kwargs.items() if key != "inplace"}
        with contextlib.suppress(*UNKNOWN):
            if name == "setitem" and soft:
                return self._set(func, *args)
            softened = SOFTENED | OF_COUNTERPARTS if soft else SOFTENED
            if name.endswith("_") and (name[:-1] in softened or goes_in_steps(name[:-1], first, **kwargs)):
                # Computed out of place, and copied into the argument, which the model continues to use.
                before = first.clone()
                self._keep(before, self._kept(first, Tensor))
                after = self.__torch_function__(not_in_place(func), types, (before, *args[1:]), kwargs)
                first.copy_(after)
                self._keep(first, self._kept(after, Tensor))
                return first
        if name in SATURATING and self.temperature is not None and _floating(first):
            return func(first / self.temperature, *args[1:], **kwargs)
        hard = func(*args, **kwargs)
        if name in CHOICES and _floating(first):
            self._choose(name, hard, args, kwargs)
        if isinstance(hard, Tensor):
            with contextlib.suppress(*UNKNOWN):
                return self._followed(name, func, hard, args, kwargs)
        return hard

    def _followed(self, name: str, func: Rule, hard: Tensor, args: Args, kwargs: dict[str, Any]) -> Tensor:
        """Give a result a useful gradient; store a counterpart of a result that is not floating-point."""
        first: Any = args[0] if args else None
        call = functools.partial(func, **kwargs)
        if is_flat(name, *args[1:], **kwargs) and _floating(first):
            return _straight(hard, first)
        if name == "hardtanh" and self.temperature is not None:
            return _straight(hard, wider(self.temperature, *args, **kwargs))
        if name in COMPARISONS and len(args) == 2:
            a, b = map(self._or_itself, args)
            self._keep(hard, self._compared(a, b, COMPARISONS[name]))
        elif name in ("eq", "ne") and len(args) == 2 and args[0] is not args[1]:
            soft = self._equal(hard, *args)
            self._keep(hard, soft if name == "eq" or soft is None else 1 - soft)
        elif name in ("bucketize", "searchsorted"):
            values, bounds = map(self._or_itself, args[:2] if name == "bucketize" else args[1::-1])
            return self._stepped(hard, self._between(values, bounds))
        elif goes_in_steps(name, hard, **kwargs):
            return self._stepped(hard, STEPS[name](*map(self._or_itself, args)))
        elif name in LOOKUPS and self._index(name, args) is not None:
            return self._soft(hard, self._looked_up(name, call, hard, args))
        elif name in CASTS and _floating(first):
            if not (_floating(hard) or hard.dtype == torch.bool):
                values = hard.dequantize() if hard.is_quantized else hard.to(first.dtype)
                self._keep(hard, _straight(values, first))
        elif name == "scatter":
            choice = self._kept(args[2], tuple)
            return hard if choice is None else self._soft(hard, self._scattered(args, choice, [*kwargs.values()]))
        elif name in CASTS | SHAPES:
            choice, soft = self._kept(first, tuple), self._kept(first, Tensor)
            if choice is not None and _floating(hard):
                return self._soft(hard, self._or_itself(first))
            if choice is not None:
                self.beside[hard] = hard._version, choice if name in CASTS else self._reshaped(name, call, hard, args)
            elif soft is not None:
                return self._soft(hard, soft if name in CASTS else call(soft, *args[1:]))
        elif any(map(self._known, args)) and not any(isinstance(arg, float) and isinf(arg) for arg in args):
            # The condition excludes arithmetic with an infinity, as in a softmax's mask: it has no softened form.
            rule = func if name in ARITHMETIC else OF_MASKS.get(name)
            if name == "where" and _floating(first):
                # For x.where(mask, other) the mask is put first, as in torch.where.
                args = (args[1], first, *args[2:])
            return hard if rule is None else self._soft(hard, rule(*map(self._or_itself, args), **kwargs))
        return hard

    def let_through(self, values: Any) -> None:
        """Let the gradient pass unchanged through each result of a user's own ``autograd.Function``."""
        for value in values:
            if isinstance(value, (list, tuple)):
                self.let_through(value)
            elif isinstance(value, Tensor) and isinstance(value.grad_fn, BackwardCFunction):
                function = value.grad_fn._forward_cls
                if function.__module__.partition(".")[0] not in ("torch", "purify_fast"):
                    # The backward pass takes the method `backward` from this class.
                    value.grad_fn._forward_cls = with_gradient(function, self.temperature is None)

    # -- counterparts -------------------------------------------------------------------------------------------------

    def _keep(self, hard: Tensor, soft: Tensor | None) -> None:
        """Store ``soft``, the smooth counterpart of the mask or index ``hard``, if it depends on the images."""
        if soft is not None and soft.requires_grad:
            self.beside[hard] = hard._version, soft

    def _kept(self, value: Any, kind: Any = (Tensor, tuple)) -> Any:
        """Return the stored entry of a tensor, if it has the type ``kind`` and the tensor has not changed, or None."""
        if not isinstance(value, Tensor) or value.is_floating_point():
            return None
        version, kept = self.beside.get(value, (None, None))
        return kept if isinstance(kept, kind) and value._version == version else None

    def _known(self, value: Any) -> bool:
        return any(map(self._known, value)) if isinstance(value, (list, tuple)) else self._kept(value) is not None

    def _or_itself(self, value: Any) -> Any:
        """Return an argument's counterpart for a formula, or the argument itself, a mask as float."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._or_itself, value))
        soft, choice = self._kept(value, Tensor), self._kept(value, tuple)
        if choice is not None:
            # The value is the index; its gradient is that of the weighted mean of all possible indices.
            weights = self._weights(value, choice)
            return _straight(value.to(weights.dtype), weights @ torch.arange(weights.shape[-1]).to(weights))
        if soft is None and isinstance(value, Tensor) and value.dtype == torch.bool:
            return value.float()
        return value if soft is None else soft

    def _soft(self, hard: Tensor, soft: Tensor | None) -> Tensor:
        """Return ``soft``, or without a temperature ``hard`` with the gradient of ``soft``."""
        if soft is None or soft.shape != hard.shape:
            return hard
        if not _floating(hard):
            self._keep(hard, soft)
            return hard
        return _straight(hard, soft) if self.temperature is None else soft.to(hard.dtype)

    def _stepped(self, hard: Tensor, smooth: Any) -> Tensor:
        """Return the value of a function with jumps, such as rounding, with the gradient of its smooth formula."""
        if not follows(smooth) or smooth.shape != hard.shape:
            return hard
        straight = _straight(hard.to(smooth.dtype), smooth)
        self._keep(hard, straight)
        return straight if _floating(hard) else hard

    # -- comparisons --------------------------------------------------------------------------------------------------

    def _compared(self, a: Any, b: Any, sign: int = 1) -> Tensor | None:
        """Return the softened form of ``a > b``, or of ``a < b`` if ``sign`` is -1."""
        difference = sign * (a - b) if _floating(a) or _floating(b) else None
        # The gradient of softsign is nowhere 0. The gradient of a sigmoid would be 0 far from the threshold.
        return 0.5 + 0.5 * softsign(self.slope * difference / _size(a, b)) if follows(difference) else None

    def _equal(self, hard: Tensor, a: Any, b: Any) -> Tensor | None:
        for chosen, other in ((a, b), (b, a)):
            if (choice := self._kept(chosen, tuple)) is not None:
                weights = self._weights(chosen, choice).expand(*hard.shape, -1)
                index = torch.as_tensor(other, device=hard.device).long().expand(hard.shape)
                exists = (index >= 0) & (index < weights.shape[-1])
                return weights.gather(-1, (index * exists)[..., None])[..., 0] * exists
        left, right = self._or_itself(a), self._or_itself(b)
        difference = abs(left - right) if _floating(left) or _floating(right) else None
        if not follows(difference) or (isinstance(b, float) and isinf(b)):
            return None
        of_masks = isinstance(a, Tensor) and a.dtype == torch.bool
        return 1 - difference if of_masks else 1 / (1 + self.slope * difference / _size(left, right))

    def _between(self, values: Any, bounds: Tensor) -> Tensor | None:
        """The softened position of numbers among sorted bounds; it rises linearly from the first bound to the last."""
        bounds = bounds[bounds.isfinite()] if bounds.dim() == 1 else bounds
        if bounds.shape[-1] == 1:
            return self._compared(values, bounds)
        width = (bounds[..., -1:] - bounds[..., :1]).clamp_min(torch.finfo(values.dtype).tiny)
        return values * ((bounds.shape[-1] - 1) / width)

    # -- indices ------------------------------------------------------------------------------------------------------

    def _choose(self, name: str, hard: Any, args: Args, kwargs: dict[str, Any]) -> None:
        at, place = CHOICES[name]
        source, last = args[0], None if name in ("argmax", "argmin", "max", "min", "median") else -1
        dim = args[at] if len(args) > at else kwargs.get("dim", last)
        if dim is None and name in ("argmax", "argmin"):
            source, dim = source.flatten(), 0
        if isinstance(dim, int) and not isinstance(dim, bool):
            index = hard if place is None else hard[place]
            self.beside[index] = index._version, (source, dim % source.dim())

    def _weights(self, index: Tensor, choice: Choice) -> Tensor:
        """The weight of each possible index, ``[*index.shape, choices]``; larger for values near the chosen value."""
        source, dim = choice
        if dim is None:
            return source
        alone = index.dim() < source.dim()
        chosen = source.gather(dim, index.unsqueeze(dim) if alone else index)
        missed = (source.movedim(dim, -1)[..., None, :] - chosen.movedim(dim, -1)[..., None]).abs()
        near = 1 / (1 + self.slope * missed / per_image(_size(source, source), missed))
        near = near / near.sum(-1, keepdim=True)
        return near.squeeze(-2) if alone else near.movedim(-2, dim)

    def _reshaped(self, name: str, call: Rule, hard: Tensor, args: Args) -> Choice:
        """Return the `Choice` of indices after a function has selected some of them or has reshaped their tensor."""
        choice = self._kept(args[0], tuple)
        source, dim = choice
        if dim is not None and name in SLICES and _without(hard, dim) == _without(source, dim):
            return choice
        weights = self._weights(args[0], choice).movedim(-1, 0).contiguous()
        return torch.vmap(lambda weight: call(weight, *args[1:]), out_dims=-1)(weights), None

    def _scattered(self, args: Args, choice: Choice, named: list[Any]) -> Tensor | None:
        """The softened form of ``x.scatter(dim, index, value)``, if the indices come from a choice."""
        x, at, index, *value = *args, *named
        source, dim = choice
        if dim is None:
            soft: Tensor | None = source.sum(at).movedim(-1, at)
        else:
            chosen = source.gather(dim, index if index.dim() == source.dim() else index.unsqueeze(dim))
            largest = chosen.mean(dim, keepdim=True) >= source.mean(dim, keepdim=True)
            sign = largest.to(source.dtype) * 2 - 1
            soft = self._compared(sign * source, (sign * chosen).amin(dim, keepdim=True))
        alone = soft is not None and len(value) == 1 and _is_number(value[0])
        return soft * value[0] + (1 - soft) * self._or_itself(x) if alone else None  # type: ignore[operator]

    def _index(self, name: str, args: Args) -> Tensor | None:
        """The indices with which a function reads from a table, if they depend on the images; otherwise None."""
        place = LOOKUPS[name][1]
        index = args[place] if len(args) > place else None
        if isinstance(index, tuple) and all(part == slice(None) for part in index[1:] if not isinstance(part, Tensor)):
            index = index[0] if sum(isinstance(part, Tensor) for part in index) == 1 else None
        masks = (torch.bool, torch.uint8)
        return index if isinstance(index, Tensor) and index.dtype not in masks and self._known(index) else None

    def _looked_up(self, name: str, call: Rule, hard: Tensor, args: Args) -> Tensor | None:
        """The softened form of a table's values at some indices, or of ``one_hot`` of the indices."""
        (of_table, of_index), index = LOOKUPS[name], self._index(name, args)
        assert index is not None
        table, choice = None if of_table is None else args[of_table], self._kept(index, tuple)
        if name == "index_select" and args[1] != 0:
            return None
        if choice is not None:
            weights = self._weights(index, choice)
            if table is None:
                return pad(weights, (0, hard.shape[-1] - weights.shape[-1]))
            rows = (table.flatten() if name == "take" else table).detach().to(weights.dtype)
            values = (weights @ (rows.flatten(1) if rows.dim() > 1 else rows)).view(hard.shape)
            # `hard` already has the table's gradient, so only the gradient of the choice is added.
            return hard + (values - values.detach()) if table.requires_grad else values
        # For a rounded index, the gradient is the slope between the values at the next lower and the next higher index.
        least, most, places = *index.aminmax(), index.long()
        above, below = (places + 1).clamp(max=most), (places - 1).clamp(min=least)
        if name == "one_hot":
            args, call = (*args[:1], hard.shape[-1]), one_hot
        rise, fall = (call(*args[:of_index], other, *args[of_index + 1 :]) for other in (above, below))
        soft = self._kept(index, Tensor)
        moved = (soft - soft.detach()) / (above - below).clamp_min(1)
        moved = moved.view(*moved.shape, *[1] * (hard.dim() - moved.dim()))
        return hard + moved * (rise - fall).detach()

    def _set(self, func: Rule, x: Tensor, index: Any, value: Any) -> None:
        mask, before = self._kept(index, Tensor), x.clone()
        func(x, index, value)
        if mask is not None and _is_number(value) and mask.shape == x.shape[: mask.dim()] and _floating(x):
            mask = mask.view(*mask.shape, *[1] * (x.dim() - mask.dim()))
            x.copy_(self._soft(x.clone(), mask * value + (1 - mask) * before))


def _size(a: Any, b: Any) -> Tensor:
    """The mean size of the compared values, for each entry of the first dimension."""
    size = (abs(a) + abs(b)).detach()
    if size.dim() > 1:
        size = per_image(size.flatten(1).mean(1), size)
    return size.clamp_min(torch.finfo(size.dtype).tiny)


def _without(tensor: Tensor, dim: int) -> list[int]:
    """The shape of a tensor without the dimension ``dim``."""
    return [size for place, size in enumerate(tensor.shape) if place != dim]


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinf(value)


def _straight(hard: Tensor, soft: Tensor) -> Tensor:
    """A tensor with the values of ``hard`` and the gradient of ``soft``."""
    return soft + (hard - soft).detach()


@functools.lru_cache(maxsize=64)
def with_gradient(function: Any, always: bool) -> type:
    """Make a subclass of a user's ``autograd.Function`` with the gradient of the identity."""
    by_vjp = function.vjp is not torch.autograd.Function.vjp
    own = function.vjp if by_vjp else function.backward

    def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        result: Any = None
        # A function that was never differentiated may have no backward, or a backward with errors.
        with contextlib.suppress(Exception):
            result = own(ctx, grad, *others)
        needed = ctx.needs_input_grad
        gradients = list(result) if isinstance(result, tuple) else [result] + [None] * (len(needed) - 1)
        edges = [edge for edge in ctx.next_functions if edge[0] is not None]
        places = [place for place, need in enumerate(needed) if need]
        for place, (node, number) in zip(places, edges, strict=True):
            if grad is not None and node._input_metadata[number].shape == list(grad.shape):
                replaced = always or gradients[place] is None
                gradients[place] = grad if replaced else _where_useful(gradients[place], grad)
                break
        return tuple(gradients)

    # The function has either `vjp` or `backward`, and this method is replaced.
    named = {"vjp" if by_vjp else "backward": staticmethod(backward), "__module__": "purify_fast"}
    return type(function.__name__, (function,), named)


def _where_useful(own: Tensor, other: Tensor) -> Tensor:
    """The gradient ``own``, or ``other`` for images where ``own`` is zero or not finite."""
    images = own.reshape(len(own), -1) if own.dim() else own.view(1, 1)
    useless = (images == 0).all(1) | ~images.isfinite().all(1)
    return torch.where(per_image(useless, own) if own.dim() else useless[0], other, own)
