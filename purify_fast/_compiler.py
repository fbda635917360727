"""The parts of `torch.compile` that this package uses, without an import of the compiler.

That import takes as long as the import of PyTorch. The first ``torch.compile`` imports ``torch._dynamo``; before that
nothing is compiled.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_graphs(function: Callable[_P, _R], recursive: bool = True) -> Callable[_P, _R]:
    """A function that no compiled graph contains, as `torch.compiler.disable` makes it.

    Args:
        function: to be called between two graphs.
        recursive: whether the functions that it calls stay uncompiled too.
    """
    # This function is private, but it is the only such decorator that does not import the compiler at once.
    disabled = getattr(torch, "_disable_dynamo", torch.compiler.disable)(function, recursive)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        chosen: Callable[_P, _R] = disabled if "torch._dynamo" in sys.modules else function
        return chosen(*args, **kwargs)

    # With this mark the compiler ends its graph before the call. Without it, the graph would end inside the call.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def constant_in_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that is called while a graph is traced, as `torch.compiler.assume_constant_result` makes it.

    Args:
        function: a function of plain values, not of tensors. Its result becomes part of the graph, its operations do
            not.
    """
    # `torch.compiler.assume_constant_result` only sets this attribute, in every version since PyTorch 2.0.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_compiled(module: Any) -> bool:
    """Tell whether `torch.compile` made a module from another."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
