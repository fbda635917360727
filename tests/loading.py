"""Loads Python files that are no modules of the package, such as tests of other folders, whose names repeat."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def module(folder: str, name: str) -> ModuleType:
    """Return the module of the file test_``name``.py in a folder of tests."""
    path = Path(__file__).parent / folder / f"test_{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    return module_at(path, f"{folder}_{path.stem}")


def module_at(path: Path, name: str | None = None) -> ModuleType:
    """Return the module of any Python file, under a name, or else under that of the file."""
    spec = importlib.util.spec_from_file_location(name or path.name.partition(".")[0], path)
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
