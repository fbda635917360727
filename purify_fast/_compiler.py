"""Mark functions for `torch.compile` without importing the compiler (``torch._dynamo``), whose import is slow."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_graphs(function: Callable[_P, _R], recursive: bool = True) -> Callable[_P, _R]:
    """Exclude a function from compiled graphs, like `torch.compiler.disable`."""
    # This private decorator is the only one that can be applied without importing the compiler.
    disabled = getattr(torch, "_disable_dynamo", torch.compiler.disable)(function, recursive)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        chosen: Callable[_P, _R] = disabled if "torch._dynamo" in sys.modules else function
        return chosen(*args, **kwargs)

    # With this attribute the compiler ends its graph before the call. Without it, the graph would end inside the call.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


class _OneGraph(threading.local):
    """Return True if this thread runs or traces a whole step of an attack; its copies have read their models before."""

    # Each thread calls this once. If the attribute were the class's, the compiler would not notice a later change.
    def __init__(self) -> None:
        self.active = False


_one_graph = _OneGraph()


@contextlib.contextmanager
def in_one_graph() -> Iterator[None]:
    """A block in which a compiled graph does not end where a frozen copy would read its model."""
    before, _one_graph.active = _one_graph.active, True
    try:
        yield
    finally:
        _one_graph.active = before


def ends_graphs() -> bool:
    """Return True while a graph is traced that must end where a frozen copy reads its model."""
    return torch.compiler.is_compiling() and not _one_graph.active


def section(name: str) -> contextlib.AbstractContextManager[Any]:
    """Name a part of the work while `torch.profiler` records it. A compiled function has no such names."""
    if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
        return contextlib.nullcontext()
    return torch.profiler.record_function(f"purify_fast: {name}")


def is_compiled(module: Any) -> bool:
    """Return True if a module is the result of `torch.compile`."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
