"""Finds the methods: each package in this folder is a method, which its module ``method`` describes as ``METHOD``."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from .. import methods

#: The methods by the names of their packages, as `purify_fast.methods.trainings.Method`.
METHODS = {
    folder.name: import_module(f"{methods.__name__}.{folder.name}.method").METHOD
    for folder in pkgutil.iter_modules(methods.__path__)
    if folder.ispkg
}
