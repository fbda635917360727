"""Let a package import each public name when it is first used (PEP 562), so ``--help`` does not import PyTorch."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_exports(package: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__all__``, ``__getattr__`` and ``__dir__`` of a package whose names are imported at their first use."""
    module = sys.modules[package]
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: "." * node.level + (node.module or "") for node in imports for alias in node.names}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        value = None if home == "." else getattr(importlib.import_module(home, package), name, None)
        if value is None:
            # The module from which the package imports the name has no such attribute. So the name is a submodule.
            value = importlib.import_module(f"{home.removesuffix('.')}.{name}", package)
        # Store the value in the package, so that the next look-up does not call this function.
        setattr(module, name, value)
        return value

    return sorted(homes), find, lambda: sorted({*vars(module), *homes})
