"""Loads the compiled extension, once. Absent is normal; present but broken is kept and told."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import torch

from ._files import is_stale

logger = logging.getLogger("purify_fast")

#: Why the extension is not loaded; None when it is.
load_error: Exception | None = None
#: Path of the shared object found, loaded or not.
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
        logger.info("compiled CPU kernels are off, the PyTorch references serve: %s", load_error)
    elif not os.environ.get("PURIFY_FAST_EXTENSION") and is_stale(Path(path), SOURCES):
        load_error = ImportError(f"{path} was built from other C++ sources than those in {SOURCES}: {BUILD_HINT}")
        logger.warning("the PyTorch references serve: %s", load_error)
    else:
        try:
            torch.ops.load_library(path)
        except Exception as error:  # a broken build must not take the pure-Python package down with it
            load_error = error
            logger.warning("%s does not load, the PyTorch references serve: %s; %s", path, error, BUILD_HINT)


def loaded() -> bool:
    """Tell whether the compiled extension is loaded."""
    return load_error is None


def has_kernel(qualified: str, key: str) -> bool:
    """Tell whether ``qualified`` (``purify_fast::op``) has its own kernel at dispatch key ``key``."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key))


if os.environ.get("PURIFY_FAST_NO_EXTENSION") != "1":
    _load()
else:
    load_error = ImportError("switched off by PURIFY_FAST_NO_EXTENSION=1")
