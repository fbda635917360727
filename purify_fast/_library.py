"""Load the compiled extension. If that fails, the package works without it; `load_error` is the reason."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

logger = logging.getLogger("purify_fast")

BUILD_HINT = (
    "build it with `PURIFY_FAST_BUILD=cpu pip install --no-build-isolation -e .` "
    "(needs a C++20 compiler, and torch and setuptools >= 77 in the environment)"
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
