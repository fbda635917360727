"""Let code that calls AutoAttack or RobustBench run this package's attacks, without a change in the code.

Methods of the other packages' classes are replaced in place, so earlier imports and existing objects change too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import fields
from types import FunctionType
from typing import Any, Literal

import torch

from ._validation import check_literal
from .attacks import original_autoattack
from .autoattack import AutoAttack

PackageName = Literal["autoattack", "robustbench"]
#: The original's settings that this package's attacks do not have, and the only value with which ours replace it.
FIXED: dict[str, dict[str, Any]] = {
    "apgd": {"topk": None},
    "apgd_targeted": {"topk": None},
    "fab": {"alpha_max": 0.1, "eta": 1.05, "beta": 0.9},
    "square": {"p_init": 0.8, "rescale_schedule": False},
}


class Patch(contextlib.ExitStack):
    """Keeps the methods that `patch` replaced. The end of a ``with`` block, `undo` and a call each restore them."""

    def undo(self) -> None:
        """Restore the other package's methods. A second call does nothing."""
        self.close()

    __call__ = undo

    def replace(self, owner: Any, name: str, replacement: Callable[[Any], Callable[..., Any]]) -> None:
        """Replace an attribute of ``owner`` by the function that ``replacement`` makes from it."""
        theirs: FunctionType = getattr(owner, name)
        # A function of this module is an earlier patch, and its undo restores theirs.
        if theirs.__globals__ is not globals():
            self.callback(setattr, owner, name, theirs)
            setattr(owner, name, replacement(theirs))


def patch(package: PackageName) -> Patch:
    """Run this package's attacks in code that calls another package, until the patch is undone.

    Their signatures and their types of results remain. With settings that our attacks do not have, theirs run.

    - "autoattack": ``run_standard_evaluation`` and ``run_standard_evaluation_individual`` of the class AutoAttack, in
      pyautoattack and in the authors' package autoattack, run `purify_fast.autoattack.AutoAttack`. Theirs run with a
      ``state_path``, with models of TensorFlow, and with changed settings that ours do not have. The protocol
      "official" and `purify_fast.attacks.AutoAttack` still run theirs.
    - "robustbench": the same for the class that ``robustbench.eval.benchmark`` calls.

    Args:
        package: "autoattack" or "robustbench".

    Returns:
        A context manager. The end of its ``with`` block, its method ``undo`` and a call of it each restore theirs.

    Raises:
        ImportError: the package cannot be imported.
        ValueError: another name.
    """
    check_literal("package", package, PackageName)
    undo = Patch()
    for theirs in _classes(package):
        if original_autoattack.implementation() is theirs:
            undo.replace(original_autoattack, "implementation", _unpatched)
        undo.replace(theirs, "run_standard_evaluation", _evaluation)
    return undo


def _classes(package: PackageName) -> list[type]:
    """The classes whose methods are replaced; ImportError if there are none."""
    if package == "robustbench":
        # torchattacks' wheel replaces files of robustbench, so robustbench must be installed after torchattacks.
        return [importlib.import_module("robustbench.eval").AutoAttack]
    found = []
    for name in ("pyautoattack", "autoattack"):
        with contextlib.suppress(ModuleNotFoundError):
            found.append(importlib.import_module(name).AutoAttack)
    if not found:
        raise ImportError("neither pyautoattack nor autoattack is installed: pip install pyautoattack")
    return found


def _unpatched(implementation: Callable[[], Any]) -> Callable[[], Any]:
    """Make a form of `original_autoattack.implementation` whose class keeps the original's method."""
    theirs, name = implementation(), "run_standard_evaluation"
    kept = type(theirs.__name__, (theirs,), {"__module__": theirs.__module__, name: vars(theirs)[name]})
    return lambda: kept


def _evaluation(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Make a form of AutoAttack's ``run_standard_evaluation`` that runs our attacks where they have all settings."""
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def run_standard_evaluation(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if given.get("state_path") is not None or not _has_our_settings(self):
            return theirs(self, *args, **kwargs)
        ours = AutoAttack(self.model, self.norm, self.epsilon, self.seed, self.verbose, version="custom")
        ours.attacks_to_run, ours.version = list(self.attacks_to_run), self.version
        ours.device = torch.device(self.device)
        ours.log_path = getattr(self.logger, "log_path", None)
        for name in FIXED:
            part = getattr(ours, name)
            for option in fields(part):
                default = getattr(part, option.name)
                value = getattr(getattr(self, name), {"rho": "thr_decr"}.get(option.name, option.name), default)
                setattr(part, option.name, value)
        size = given.get("bs", given.get("batch_size", 250))
        # pyautoattack has no such argument, and always returns the labels.
        labels = given.get("return_labels", "return_labels" not in signature.parameters)
        return ours.run_standard_evaluation(given["x_orig"], given["y_orig"], size, labels)

    return run_standard_evaluation


def _has_our_settings(theirs: Any) -> bool:
    """Tell whether our attacks have all settings of an object of the original's class."""
    if getattr(theirs, "is_tf_model", False):
        return False
    ball = {"norm": theirs.norm, "eps": theirs.epsilon}
    larger = theirs.apgd.use_largereps or theirs.apgd_targeted.use_largereps
    # In the l1 ball, our Auto-PGD always begins in larger balls.
    return (theirs.norm == "L1" or not larger) and all(
        getattr(getattr(theirs, name), option) == value
        for name, fixed in FIXED.items()
        for option, value in (fixed | ball).items()
    )
