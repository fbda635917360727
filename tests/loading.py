"""Loads files of tests of other folders, whose names are not unique."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def module(folder: str, name: str) -> ModuleType:
    """Return the module of the file test_``name``.py in a folder of tests."""
    path = Path(__file__).parent / folder / f"test_{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"{folder}_{path.stem}", path)
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
