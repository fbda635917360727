"""Good arguments made bad, and what may come of it: a right result, or a refusal that names an argument."""

import contextlib
import enum
import inspect
import math
import os
import re

import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))


def fuzzed(test, share=1.0):
    """A test of many examples, which it draws from its argument ``data``; FUZZ_EXAMPLES says how many."""
    chosen = settings(
        max_examples=max(2, int(share * EXAMPLES)),
        deadline=None,
        database=None,
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    return chosen(given(data=st.data())(test))


#: Numbers in the place of any number.
NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 1e-45, 1e30, 2**63, -(2**63) - 1, math.nan, math.inf, -math.inf)
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64)
SPECIAL = (math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0)
#: By name, the dimensions that a tensor must have at least, and a function that changes it.
TENSORS = {
    "dtype": (0, lambda draw, x: x.to(draw(st.sampled_from(DTYPES)))),
    "special": (0, lambda draw, x: _special(draw, x) if x.is_floating_point() and x.numel() else x),
    "strided": (0, lambda draw, x: torch.stack([x, x], -1)[..., 0]),
    "transposed": (2, lambda draw, x: x.transpose(0, -1)),
    "expanded": (1, lambda draw, x: x[:1].expand_as(x)),
    "empty": (1, lambda draw, x: x.narrow(draw(st.integers(0, x.dim() - 1)), 0, 0)),
    "meta": (0, lambda draw, x: x.to("meta")),
    "longer": (0, lambda draw, x: x[None]),
    "flat": (0, lambda draw, x: x.flatten()),
    "scalar": (0, lambda draw, x: x.flatten()[0] if x.numel() else x),
    "channels_last": (0, lambda draw, x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x),
    "reversed": (1, lambda draw, x: x.flip(0)),
    "offset": (0, lambda draw, x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)),
    "large batch": (1, lambda draw, x: x.repeat(7, *[1] * (x.dim() - 1))),
}


def other_tensor(draw, tensor: Tensor) -> tuple[str, Tensor]:
    """A tensor made another one, and how."""
    how = draw(st.sampled_from(list(TENSORS)))
    least, change = TENSORS[how]
    with torch.no_grad():
        return how, change(draw, tensor.detach()) if tensor.dim() >= least else tensor.detach()


def _special(draw, x: Tensor) -> Tensor:
    made = x.clone(memory_format=torch.contiguous_format)
    for _ in range(draw(st.integers(1, 3))):
        made.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(SPECIAL))
    return made


def mangled(draw, arguments: dict, times: int) -> tuple[dict, list[str]]:
    """The arguments with some of them made others, and what was done to them."""
    made, done = dict(arguments), []
    for _ in range(times):
        name = draw(st.sampled_from(sorted(made)))
        value = made[name]
        if isinstance(value, enum.Enum):
            continue
        if isinstance(value, Tensor):
            how, made[name] = other_tensor(draw, value)
            done.append(f"{name}: {how}")
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            at = draw(st.integers(0, len(value) - 1))
            how, other = other_tensor(draw, value[at])
            made[name] = [*value[:at], other, *value[at + 1 :]]
            done.append(f"{name}[{at}]: {how}")
        elif isinstance(value, str):
            made[name] = draw(st.sampled_from(["", "LINF", "none", "l2", value.upper(), "\0", "mean"]))
            done.append(f"{name} = {made[name]!r}")
        elif isinstance(value, (int, float)):
            made[name] = draw(st.sampled_from(NUMBERS))
            if isinstance(value, int) and isinstance(made[name], float):
                # a float in the place of a whole number is another type; of whole numbers any
                made[name] = int(made[name]) if math.isfinite(made[name]) else -3
            done.append(f"{name} = {made[name]!r}")
    return made, done


def on_meta(value):
    """An argument with its tensors as shapes without numbers."""
    if isinstance(value, list):
        return [on_meta(part) for part in value]
    return value.to("meta") if isinstance(value, Tensor) else value


CONTEXTS = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: _deterministic(),
}


@contextlib.contextmanager
def _deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def names_of(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def named(error: Exception, names: list[str]) -> bool:
    """Tell whether a refusal names one of the arguments."""
    said, words = str(error).replace("_", " "), [re.escape(name.replace("_", " ")) for name in names]
    return any(re.search(rf"(?<!\w){word}(?!\w)", said) for word in words)


def tensors(value) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in tensors(part)]


def ordinary(arguments: dict) -> bool:
    """Tell whether all numbers in all tensors are finite and of a size that no sum overflows with."""
    parts = [t for value in arguments.values() if isinstance(value, (Tensor, list)) for t in tensors(value)]
    return all(not t.is_floating_point() or t.is_meta or bool((t.abs() < 1e4).all()) for t in parts)
