"""Writes down two facts that are needed to repeat an evaluation: the call of `evaluate`, and the processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import torch

from ..ops.dispatch.records import processor

#: Arguments of `evaluate` that the written call leaves out, because they do not change the report.
WITHOUT = ("progress", "out")
#: If the text of an argument has more characters than this, the call has the argument's name instead of its value.
LONGEST = 300


def written_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Write a call as Python code; an argument whose value has no short code, such as a model, is written by its name.

    Args:
        function: the called function.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    parameters = [each for each in signature(function).parameters.values() if each.kind is not Parameter.KEYWORD_ONLY]
    written = [each.name for each, _ in zip(parameters, args, strict=False)]
    written += [f"{name}={_as_text(name, value)}" for name, value in kwargs.items() if name not in WITHOUT]
    return f"{function.__name__}({', '.join(written)})"


def _as_text(name: str, value: Any) -> str:
    if callable(value) or isinstance(value, (torch.Tensor, Mapping)):
        return name
    text = repr(value)
    # The default repr of an object contains its address in angle brackets, which is no code.
    return name if len(text) > LONGEST or "<" in text or "tensor(" in text or "\n" in text else text


def processor_name(device: torch.device) -> str:
    """The name of the GPU or the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
