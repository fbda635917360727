"""A module that a function of the user's own returns, by its place: ``package.module:name`` or ``file.py:name``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Literal

import torch
from torch import nn

#: The modules of the user's own that were imported here, by name.
_imported_names: set[str] = set()
#: Where this package is, and where PyTorch and Python's library are.
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_LIBRARY = tuple(sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "platstdlib"))
#: Folders of these names hold installed packages, inside Python's library or elsewhere.
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
FORMS = "package.module:function or path/to/file.py:function"


def made_by(spec: str, *, fresh: bool = False) -> nn.Module:
    """What a function or class returns that is called without arguments; nothing else is imported than it says.

    Args:
        spec: ``package.module:name``, where modules in the working folder are found too, or ``path/to/file.py:name``,
            where those beside the file are. That folder stays on ``sys.path``, since a model may import more when it
            runs. A module that exists already, as a variable of that name, is taken as it is.
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
    # as by ``python -m`` and ``python file.py``: modules of this folder are found first, also later, inside forward
    folder = str(Path(place).resolve().parent) if place.endswith(".py") else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = _imported(spec, place)
    _imported_names.add(module.__name__)
    factory = _named(spec, module, name)
    if isinstance(factory, nn.Module):
        if fresh:
            raise ValueError(
                f"spec {spec!r} must name a function or class that makes a new module at each call; {name} is a "
                "module that exists already, and all classifiers of this name would share its weights"
            )
        return factory
    try:
        model = factory()
    except SystemExit as error:
        raise ValueError(f"{spec} must return a torch.nn.Module, but it ended the program: {_told(error)}") from error
    except Exception as error:
        raise ValueError(f"{spec} must work without arguments, but it failed: {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} must return a torch.nn.Module, it returned a {type(model).__name__}")
    return model


def forget_imported() -> None:
    """Forget the modules that `made_by` imported, so that `raised_in` judges a later error without them."""
    _imported_names.clear()


def raised_in(error: BaseException) -> Literal["own", "called by own", "package"]:
    """Whose code raised an error: the user's own, this package, or this package when the user's code called it.

    Frames of Python's library and of installed packages are passed over: what they raise, their caller asked for.
    The innermost frame that is left decides.

    Args:
        error: that was raised.

    Returns:
        "own" if that frame is of the user's code, in whichever file; "called by own" if it is of this package, and the
        user's code stands above it; "package" for everything else, and where `made_by` imported nothing.
    """
    if not _imported_names:
        return "package"
    whose = [_whose(frame) for frame, _ in traceback.walk_tb(error.__traceback__)]
    left = [owner for owner in whose if owner is not None]
    if not left or "own" not in left:
        return "package"
    return "own" if left[-1] == "own" else "called by own"


def _whose(frame: FrameType) -> Literal["own", "package"] | None:
    """Whose code a frame runs; None for Python's library, for installed packages, and for code without a file."""
    file, name = frame.f_code.co_filename, str(frame.f_globals.get("__name__"))
    if file.startswith(_PACKAGE):
        return "package"
    if file.startswith(_TORCH):
        return None
    # before the installed packages, since the user's may be one of them
    if name.partition(".")[0] in {imported.partition(".")[0] for imported in _imported_names}:
        return "own"
    passed_over = file.startswith(_LIBRARY) or any(folder in file for folder in _INSTALLED)
    return "own" if os.path.isabs(file) and not passed_over else None


def _imported(spec: str, place: str) -> ModuleType:
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise FileNotFoundError(f"{spec}: there is no file {place}")
    try:
        return _from_file(Path(place)) if is_file else importlib.import_module(place)
    except ImportError as error:
        raise ModuleNotFoundError(f"{spec}: {error}") from error
    except SystemExit as error:
        raise ValueError(
            f"{spec}: {place} cannot be imported, since it ends the program: {_told(error)}. Put what reads the "
            'command line, or only belongs to running the file, below `if __name__ == "__main__":`'
        ) from error
    except Exception as error:
        raise ValueError(f"{spec}: {place} cannot be imported: {_told(error)}") from error


def _from_file(path: Path) -> ModuleType:
    """The file as a module of a name of its own, so that it hides no other module."""
    name = f"own_{path.stem}"
    place = importlib.util.spec_from_file_location(name, path.resolve())
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    # dataclasses and pickle look a class's module up
    sys.modules[name] = module
    try:
        place.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _named(spec: str, module: ModuleType, name: str) -> Any:
    if name not in vars(module):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"{spec}: {module.__name__} ({module.__file__}) has no function or class {name!r}{hint}")
    value = vars(module)[name]
    if not callable(value):
        raise ValueError(f"{spec} must be a function or class, it is a {type(value).__name__}, which cannot be called")
    return value


def _told(error: BaseException) -> str:
    """An error of the user's code in one line, with the innermost line of that code, or else where it was raised."""
    # this file and Python's import system, whose files are named <frozen ...>, are no news to the user
    places = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith((__file__, "<frozen "))
    ]
    own = [(frame, line) for frame, line in places if _whose(frame) == "own"]
    at = "".join(f" ({frame.f_code.co_filename}, line {line})" for frame, line in (own or places)[-1:])
    return f"{type(error).__name__}: {error}{at}"
