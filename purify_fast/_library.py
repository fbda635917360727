"""Load the compiled extension. If that fails, the package works without it; `load_error` is the reason."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

logger = logging.getLogger("purify_fast")

BUILD_HINT = (
    "build it in a folder with the sources: `PURIFY_FAST_BUILD=cpu pip install --no-build-isolation .`, with `-e` if "
    "Python imports it from there (needs a C++20 compiler, and torch, setuptools >= 77 and ninja in the environment)"
)


def _find() -> str | None:
    """The path in the variable PURIFY_FAST_EXTENSION, or else the path of the installed extension."""
    spec = importlib.util.find_spec("purify_fast._C")
    return os.path.expanduser(os.environ.get("PURIFY_FAST_EXTENSION", "")) or (spec.origin if spec else None)


def _load() -> ImportError | None:
    """Load the extension. Return the reason if it cannot be loaded."""
    if path is None:
        return ImportError(f"purify_fast._C is not installed: {BUILD_HINT}")
    try:
        torch.ops.load_library(path)
    # The pure-Python package must work in spite of an extension that cannot be loaded.
    except Exception as error:
        return ImportError(f"{path} cannot be loaded: {error.__cause__ or error}; {BUILD_HINT}")
    return None


def loaded() -> bool:
    """Return True if the compiled extension is loaded."""
    return load_error is None


def has_kernel(qualified: str, key: str) -> bool:
    """Return True if the op ``qualified`` (such as ``purify_fast::op``) has a kernel for the dispatch key ``key``."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key))


#: Path of the extension, even if it could not be loaded; None if it is not installed or switched off.
path: str | None = None
#: The reason why the extension is not loaded; None if it is loaded.
load_error: Exception | None = None
if os.environ.get("PURIFY_FAST_NO_EXTENSION") == "1":
    load_error = ImportError("switched off by PURIFY_FAST_NO_EXTENSION=1: unset this variable to load the extension")
else:
    path = _find()
    if load_error := _load():
        level = logging.INFO if path is None else logging.WARNING
        logger.log(level, "the compiled CPU kernels are off, and PyTorch computes their operations: %s", load_error)


# --  compiler ---------------------------------------------------------------------------------------------------------

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
