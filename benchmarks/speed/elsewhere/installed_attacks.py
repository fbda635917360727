"""Attacks of other packages, as their own functions run them."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from . import ALPHA, EPS, Batches, Dtype, Form, Row, with_our_line
from .expert_changes import WRITTEN, Frozen

#: Steps of each attack. The packages take up to 100.
STEPS = 10
#: A radius at which few images fall, so that no contestant has less work than another.
TINY = 0.5 / 255
#: Where `make test` puts the last setuptools that has pkg_resources, which RobustBench imports.
PKG_RESOURCES = Path(sys.prefix) / "setuptools-80"

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def apgd_ce(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Attack by Auto-PGD with the cross-entropy, and return the points of the highest loss."""
    base = importlib.import_module("pyautoattack.autopgd_base")
    return base.APGDAttack(model, n_iter=STEPS, eps=EPS, device="cpu").perturb(x, y, best_loss=True)


def apgd_t(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Attack by Auto-PGD with the targeted loss DLR and one target, and return the misclassified points."""
    base = importlib.import_module("pyautoattack.autopgd_base")
    return base.APGDAttack_targeted(model, n_iter=STEPS, eps=EPS, n_target_classes=1, device="cpu").perturb(x, y)


def torchattacks_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Attack by PGD of torchattacks."""
    return importlib.import_module("torchattacks").PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS)(x, y)


@functools.cache
def _clean_accuracy() -> Callable[..., float]:
    """Import RobustBench's function, with the package and the folder that the import needs."""
    # RobustBench imports the name of the authors' repository, which is not in the package index.
    needed = {name: importlib.import_module(f"py{name}") for name in ("autoattack", "autoattack.state")}
    sys.modules.update(needed)
    sys.path.append(str(PKG_RESOURCES))
    try:
        return importlib.import_module("robustbench.utils").clean_accuracy
    finally:
        sys.path.remove(str(PKG_RESOURCES))
        for name in needed:
            del sys.modules[name]


def robustbench(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Compute the accuracies as RobustBench's `benchmark` does, with two attacks of AutoAttack."""
    autoattack = importlib.import_module("pyautoattack")
    accuracy = _clean_accuracy()
    accuracy(model, x, y, batch_size=len(x))
    adversary = autoattack.AutoAttack(model, eps=TINY, norm="Linf", version="custom", attacks=["apgd-ce", "apgd-t"])
    adversary.verbose, adversary.seed = False, 0
    for part in (adversary.apgd, adversary.apgd_targeted):
        part.n_iter, part.n_restarts = STEPS, 1
    adversary.apgd_targeted.n_target_classes = 1
    near, _ = adversary.run_standard_evaluation(x, y, batch_size=len(x))
    accuracy(model, near, y, batch_size=len(x))
    return near


def attacked(model: nn.Module, batches: Batches, dtype: Dtype, attack: Attack) -> Iterator[Tensor]:
    """Attack each batch."""
    model.eval()
    for x, y in batches:
        yield attack(model, x, y).detach()


def attacked_by_expert(model: nn.Module, batches: Batches, dtype: Dtype, attack: Attack) -> Iterator[Tensor]:
    """Attack a frozen copy."""
    return attacked(Frozen(model, dtype), batches, dtype, attack)


def _row(attack: Attack, package: str) -> Row:
    theirs = Form(partial(attacked, attack=attack), (attacked,))
    by_expert = Form(partial(attacked_by_expert, attack=attack), (attacked_by_expert, attacked, *WRITTEN))
    return Row(8, theirs, by_expert, with_our_line(theirs), False, package=package)


ROWS = {
    "APGD-CE of pyautoattack": _row(apgd_ce, "pyautoattack"),
    "APGD-T of pyautoattack": _row(apgd_t, "pyautoattack"),
    "PGD of torchattacks": _row(torchattacks_pgd, "torchattacks"),
    "RobustBench with AutoAttack": _row(robustbench, "robustbench"),
}
