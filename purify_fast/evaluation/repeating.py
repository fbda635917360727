"""What somebody needs who repeats an evaluation: the call, and what it was computed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import torch

from ..ops.dispatch.cache import processor

#: Arguments that change nothing of a report.
WITHOUT = ("progress", "out")
#: Characters of an argument beyond which only its name is written.
LONGEST = 300


def written_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A call as Python writes it; an argument that no short text makes again, such as a model, stands by its name.

    Args:
        function: what was called.
        args: by place.
        kwargs: by name.
    """
    parameters = [each for each in signature(function).parameters.values() if each.kind is not Parameter.KEYWORD_ONLY]
    written = [each.name for each, _ in zip(parameters, args, strict=False)]
    written += [f"{name}={_as_text(name, value)}" for name, value in kwargs.items() if name not in WITHOUT]
    return f"{function.__name__}({', '.join(written)})"


def _as_text(name: str, value: Any) -> str:
    if callable(value) or isinstance(value, (torch.Tensor, Mapping)):
        return name
    text = repr(value)
    # an object without a text of its own has its address in it
    return name if len(text) > LONGEST or "<" in text or "tensor(" in text or "\n" in text else text


def processor_name(device: torch.device) -> str:
    """What computed, as the system calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
