"""The names and files of version 0.1, which still work in this release; each use of an old name warns once.

This is the only file that knows old names. It imports nothing of the package when it is loaded, so that every part of
the package may use it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

#: Packages that moved. An attribute of an old package is looked for in these, in order.
MOVED_PACKAGES: dict[str, tuple[str, ...]] = {
    "purify_fast.carso": ("purify_fast.methods.carso",),
    "purify_fast.atop": ("purify_fast.methods.atop",),
    "purify_fast.arrest": ("purify_fast.methods.arrest",),
    "purify_fast.nn": (
        "purify_fast.models",
        "purify_fast.defences",
        "purify_fast.speed",
        "purify_fast.methods.carso",
        "purify_fast.methods.atop",
    ),
}

#: Attributes that have another name in the new packages.
RENAMED_ATTRIBUTES: dict[str, str] = {}


def warn(old: str, new: str) -> None:
    """Say that ``old`` is now called ``new``."""
    # the caller of the deprecated name, not this module, is where the warning points
    warnings.warn(f"{old} is deprecated and goes in the next release: use {new}", DeprecationWarning, stacklevel=3)


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """A decorator that still takes keyword arguments by their old names, with a warning.

    Args:
        names: old name to new name.

    Raises:
        TypeError: from the decorated function, when both names of an argument are given.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(f"{function.__qualname__}() got both {new!r} and its old name {old!r}")
                warn(f"the argument {old!r} of {function.__qualname__}()", repr(new))
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def renamed_value(argument: str, value: str, names: Mapping[str, str]) -> str:
    """The new name of a mode that is given as a string, with a warning; a value that has no new name as it is.

    Args:
        argument: what takes the mode, as the caller writes it.
        value: the mode that was given.
        names: old name to new name.

    Returns:
        The name that is in use now.
    """
    if value not in names:
        return value
    text = f"{argument}={value!r} is deprecated and goes in the next release: use {names[value]!r}"
    # this function, the one that takes the mode, and its caller: there the warning points
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return names[value]


def renamed(mapping: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A saved file's settings under their new names; the others stay as they are."""
    return {names.get(name, name): value for name, value in mapping.items()}


class _MovedPackage(ModuleType):
    """Stands for a package that moved: its attributes are those of the new packages."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        new = RENAMED_ATTRIBUTES.get(name, name)
        for package in MOVED_PACKAGES[self.__name__]:
            module = importlib.import_module(package)
            if new in vars(module):
                warn(f"{self.__name__}.{name}", f"{package}.{new}")
                return vars(module)[new]
        raise AttributeError(
            f"{self.__name__} has moved to {', '.join(MOVED_PACKAGES[self.__name__])}: no {name!r} there"
        )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of `MOVED_PACKAGES`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED_PACKAGES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _MovedPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Let ``import`` find the packages that moved; called once by ``purify_fast/__init__.py``."""
    if not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
