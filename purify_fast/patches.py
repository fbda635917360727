"""Let the attacks of other packages run on this package, with the signatures that their users know.

    with purify_fast.patch("torchattacks"):
        adversarial = torchattacks.PGD(model, eps=8 / 255)(images, labels)

Names that were imported before are replaced too. What this package does not have runs as before.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor

from . import attacks
from .autoattack import AutoAttack


class Patch:
    """The replaced names of a package. As a context manager, it undoes the replacement at the end of the block."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def replace(self, theirs: Any, ours: Any) -> None:
        """Replace an object in all modules that have been imported."""
        for module in list(sys.modules.values()):
            for name in [name for name, value in vars(module).items() if value is theirs]:
                self.set(module, name, ours)

    def set(self, module: Any, name: str, ours: Any) -> None:
        """Replace one name of a module."""
        self._before.append((module, name, getattr(module, name)))
        setattr(module, name, ours)

    def undo(self) -> None:
        """Give all names their former objects."""
        while self._before:
            setattr(*self._before.pop())

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


class _ByKeywords(AutoAttack):
    """`AutoAttack` with the interface of the package pyautoattack, whose evaluations also return the predictions."""

    def __init__(self, model: Any, *, attacks: Any = None, **options: Any):
        custom = {"version": "custom", "attacks_to_run": attacks} if attacks is not None else {}
        super().__init__(model, **(options | custom))

    def run_standard_evaluation(self, x: Tensor, y: Tensor, /, **options: Any) -> Any:  # type: ignore[override]
        return super().run_standard_evaluation(x, y, return_labels=True, **options)


def _or_theirs(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes ours, or theirs for arguments that ours does not have."""

    @functools.wraps(theirs, updated=())
    def make(*given: Any, **named: Any) -> Any:
        try:
            return ours(*given, **named)
        except (TypeError, ValueError):
            return theirs(*given, **named)

    return make


def _patch_autoattack(patch: Patch) -> None:
    found = 0
    for name, ours in (("autoattack", AutoAttack), ("pyautoattack", _ByKeywords)):
        try:
            theirs = importlib.import_module(name).AutoAttack
        except ImportError:
            continue
        found += 1
        patch.replace(theirs, _or_theirs(ours, theirs))
    if not found:
        raise ImportError("neither autoattack nor pyautoattack is installed")


def _patch_robustbench(patch: Patch) -> None:
    module = importlib.import_module("robustbench.eval")
    patch.set(module, "AutoAttack", _or_theirs(AutoAttack, module.AutoAttack))


def _patch_torchattacks(patch: Patch) -> None:
    package = importlib.import_module("torchattacks")
    for name, run in _TORCHATTACKS.items():
        theirs = getattr(package, name)

        def forward(self: Any, images: Tensor, labels: Tensor, theirs: Any = theirs, run: Any = run) -> Tensor:
            # Their targeted modes choose targets, and their normalization is a part of their model.
            if self.targeted or self.normalization_used is not None:
                result: Tensor = theirs.forward(self, images, labels)
                return result
            ours: Tensor = run(self, images.to(self.device), labels.to(self.device))
            return ours

        patch.replace(theirs, type(name, (theirs,), {"forward": forward, "__doc__": theirs.__doc__}))


def _pgd(theirs: Any, x: Tensor, y: Tensor, *, start: bool | None = None) -> Tensor:
    start = theirs.random_start if start is None else start
    return attacks.pgd(theirs.model, x, y, theirs.eps, alpha=theirs.alpha, steps=theirs.steps, random_start=start)


def _apgd(theirs: Any, x: Tensor, y: Tensor) -> Tensor:
    how = {"norm": theirs.norm, "steps": theirs.steps, "restarts": theirs.n_restarts, "loss": theirs.loss}
    how |= {"eot_iter": theirs.eot_iter, "rho": theirs.thr_decr, "seed": theirs.seed}
    return attacks.apgd(theirs.model, x, y, theirs.eps, **how)


#: The classes of torchattacks that this package has, each with a function that runs it.
_TORCHATTACKS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "FGSM": lambda theirs, x, y: attacks.fgsm(theirs.model, x, y, theirs.eps),
    "BIM": functools.partial(_pgd, start=False),
    "PGD": _pgd,
    "APGD": _apgd,
}
_PACKAGES = {"autoattack": _patch_autoattack, "torchattacks": _patch_torchattacks, "robustbench": _patch_robustbench}


def patch(package: str) -> Patch:
    """Let a package's attacks run on this package.

    Args:
        package: "autoattack" replaces the class ``AutoAttack`` of the packages autoattack and pyautoattack.
            "robustbench" replaces the AutoAttack in ``robustbench.benchmark``. "torchattacks" replaces ``FGSM``,
            ``BIM``, ``PGD`` and ``APGD``; their targeted modes and their normalization run as before.

    Returns:
        A context manager, whose method ``undo`` ends the replacement too.

    Raises:
        ImportError: the package is not installed.
        ValueError: the package is none of the three.
    """
    if package not in _PACKAGES:
        raise ValueError(f"package must be one of {', '.join(_PACKAGES)}, got {package!r}")
    made = Patch()
    _PACKAGES[package](made)
    return made
