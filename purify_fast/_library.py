"""Loads the compiled extension once. A missing extension is normal; the error of a broken one is kept and logged."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import torch

from ._files import is_stale

logger = logging.getLogger("purify_fast")

#: The error that says why the extension is not loaded; None if it is loaded.
load_error: Exception | None = None
#: Path of the shared object, even if it could not be loaded; None if there is no such file.
path: str | None = None

BUILD_HINT = (
    "build it with `PURIFY_FAST_BUILD=cpu pip install --no-build-isolation -e .` "
    "(needs a C++20 compiler, and torch and setuptools >= 77 in the environment)"
)


#: The C++ sources of a checkout.
SOURCES = Path(__file__).parents[1] / "csrc"


def _find() -> str | None:
    """PURIFY_FAST_EXTENSION, a shared object built elsewhere, or the installed one."""
    spec = importlib.util.find_spec("purify_fast._C")
    return os.environ.get("PURIFY_FAST_EXTENSION") or (spec.origin if spec is not None else None)


def _load() -> None:
    global load_error, path
    path = _find()
    if path is None:
        load_error = ImportError(f"purify_fast._C is not installed: {BUILD_HINT}")
        logger.info("the compiled CPU kernels are off, and PyTorch computes their operations: %s", load_error)
    elif not os.environ.get("PURIFY_FAST_EXTENSION") and is_stale(Path(path), SOURCES):
        load_error = ImportError(f"{path} was built from other C++ sources than those in {SOURCES}: {BUILD_HINT}")
        logger.warning("the compiled CPU kernels are off, and PyTorch computes their operations: %s", load_error)
    else:
        try:
            torch.ops.load_library(path)
        except Exception as error:  # the pure-Python package must work in spite of a broken extension
            load_error = error
            logger.warning(
                "%s cannot be loaded, so PyTorch computes the operations of the compiled CPU kernels: %s; %s",
                path,
                error,
                BUILD_HINT,
            )


def loaded() -> bool:
    """Tell whether the compiled extension is loaded."""
    return load_error is None


def has_kernel(qualified: str, key: str) -> bool:
    """Tell whether ``qualified`` (``purify_fast::op``) has its own kernel at dispatch key ``key``."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key))


if os.environ.get("PURIFY_FAST_NO_EXTENSION") != "1":
    _load()
else:
    load_error = ImportError("switched off by PURIFY_FAST_NO_EXTENSION=1: unset this variable to load the extension")
