"""The parts of `torch.compile` that this package uses, without importing it: that takes as long as PyTorch itself.

The first ``torch.compile`` imports ``torch._dynamo``. Before it nothing is compiled.
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
    # private, but the only decorator that does not import the compiler immediately
    disabled = getattr(torch, "_disable_dynamo", torch.compiler.disable)(function, recursive)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        chosen: Callable[_P, _R] = disabled if "torch._dynamo" in sys.modules else function
        return chosen(*args, **kwargs)

    # the compiler ends its graph before the call; without the mark it would do so inside
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def constant_in_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that is called while a graph is traced, as `torch.compiler.assume_constant_result` makes it.

    Args:
        function: a function of plain values, not of tensors. Its result becomes part of the graph, its operations do
            not.
    """
    # PyTorch's decorator does only this, in every version from 2.0
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_compiled(module: Any) -> bool:
    """Tell whether `torch.compile` made a module from another."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
