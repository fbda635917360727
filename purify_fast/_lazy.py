"""Packages whose names are imported when they are first asked for.

PyTorch takes about 1.8 seconds to import. The command line prints its help and refuses wrong options without it, so the
packages on the way to the settings of a training must not import what computes before it is used (PEP 562).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(
    package: str, names: Mapping[str, Sequence[str]], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package that imports its public names when they are first asked for.

    Args:
        package: the package's ``__name__``.
        names: for each module, by its name relative to the package (``".defence"``), the public names it defines.
        submodules: modules and packages directly inside it that are public names themselves.

    Returns:
        Two functions, to be assigned to ``__getattr__`` and ``__dir__`` of the package.
    """
    home = {name: module for module, several in names.items() for name in several}

    def find(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f".{name}", package)
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name], package), name)
        # the next look-up finds it without this function
        setattr(sys.modules[package], name, value)
        return value

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home, *submodules})

    return find, listing
