"""Packages whose names are imported when they are first asked for (PEP 562).

PyTorch takes about 1.8 seconds to import. The command line prints its help and refuses wrong options without it, so the
packages on the way to the settings of a training must not import what computes before that is used.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_exports(package: str, **homes: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package that imports its public names when they are first asked for.

    Args:
        package: the package's ``__name__``.
        homes: for each public name the module that defines it, relative to the package: ``Carso=".methods.carso"``,
            or ``data=".data:"`` for a name that is a module itself.

    Returns:
        Two functions, to be assigned to ``__getattr__`` and ``__dir__`` of the package.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        path, is_module, _ = homes[name].partition(":")
        module = importlib.import_module(path, package)
        value = module if is_module else getattr(module, name)
        # the next look-up finds it without this function
        setattr(sys.modules[package], name, value)
        return value

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return find, listing
