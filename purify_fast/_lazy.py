"""Packages that import a public name when it is first used (PEP 562).

PyTorch takes about 1.8 seconds to import. The command line prints its help and refuses wrong options without PyTorch.
So the packages that it imports for the settings of a training must import PyTorch only when they compute.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_exports(package: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__all__``, ``__getattr__`` and ``__dir__`` of a package whose public names are imported when they are used.

    The package lists each name once, for type checkers: ``from .module import name as name`` in the block under
    ``if TYPE_CHECKING:``, which Python does not run.

    Args:
        package: the package's ``__name__``.
    """
    module = sys.modules[package]
    source = module.__spec__.loader.get_source(package)  # type: ignore[union-attr]
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: "." * node.level + (node.module or "") for node in imports for alias in node.names}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        value = None if home == "." else getattr(importlib.import_module(home, package), name, None)
        if value is None:
            # The name is that of a module.
            value = importlib.import_module(f"{home.removesuffix('.')}.{name}", package)
        # Store the value in the package, so that the next look-up does not call this function.
        setattr(module, name, value)
        return value

    return sorted(homes), find, lambda: sorted({*vars(module), *homes})
