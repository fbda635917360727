"""A module that a function of the user's own returns, by its place: ``package.module:name`` or ``file.py:name``."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

#: The modules of the user's own that were imported here, by name.
_imported_names: set[str] = set()
FORMS = "package.module:function or path/to/file.py:function"


def made_by(spec: str, *, fresh: bool = False) -> nn.Module:
    """What a function or class returns that is called without arguments; nothing else is imported than it says.

    Args:
        spec: ``package.module:name``, where modules beside the user are found too, or ``path/to/file.py:name``, where
            those beside the file are. A module that exists already, as a variable of that name, is taken as it is.
        fresh: refuse a module that exists already, since every model of that name would have the same weights.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the module, or one that it imports, is not installed.
        ValueError: there is no such name, it is not callable, it fails, or it returns no module; or `fresh` asks for a
            new module where one exists already.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"a model of your own is {FORMS}, got {spec!r}")
    with _found_beside(str(Path(place).resolve().parent) if _is_file(place) else os.getcwd()):
        module = _imported(spec, place)
        _imported_names.add(module.__name__)
        found = _named(spec, module, name)
        if isinstance(found, nn.Module):
            if fresh:
                raise ValueError(
                    f"spec {spec!r} must name a function or class that makes a new module at each call; {name} is a "
                    "module that exists already, and all classifiers of this name would share its weights"
                )
            return found
        try:
            made = found()
        except Exception as error:
            raise ValueError(f"{spec} must work without arguments, but it failed: {_told(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{spec} must return a torch.nn.Module, it returned a {type(made).__name__}")
    return made


def is_of_own_code(error: BaseException) -> bool:
    """Whether an error went through code that `made_by` imported.

    Args:
        error: that was raised.
    """
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") in _imported_names for frame, _ in frames)


def _is_file(place: str) -> bool:
    return place.endswith(".py")


@contextlib.contextmanager
def _found_beside(folder: str) -> Iterator[None]:
    """Modules in a folder are found too, as by ``python -m`` and ``python file.py``."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _imported(spec: str, place: str) -> ModuleType:
    if _is_file(place) and not Path(place).is_file():
        raise FileNotFoundError(f"{spec}: there is no file {place}")
    try:
        return _from_file(Path(place)) if _is_file(place) else importlib.import_module(place)
    except ImportError as error:
        raise ModuleNotFoundError(f"{spec}: {error}") from error
    except Exception as error:
        raise ValueError(f"{spec}: {place} cannot be imported: {_told(error)}") from error


def _from_file(path: Path) -> ModuleType:
    """The file as a module of a name of its own, so that it hides no other module."""
    name = f"own_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path.resolve())
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    # dataclasses and pickle look a class's module up
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _named(spec: str, module: ModuleType, name: str) -> Any:
    if name not in vars(module):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"{spec}: {module.__name__} ({module.__file__}) has no function or class {name!r}{hint}")
    found = vars(module)[name]
    if not callable(found):
        raise ValueError(f"{spec} must be a function or class, it is a {type(found).__name__}, which cannot be called")
    return found


def _told(error: Exception) -> str:
    """An error of the user's code in one line, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{at}"
