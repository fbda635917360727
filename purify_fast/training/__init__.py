"""What the methods' training shares: the loop, checkpoints, schedules, and the training of classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .attack import TrainingAttack as TrainingAttack
    from .classifier import ClassifierTask as ClassifierTask
    from .classifier import is_classifier as is_classifier
    from .classifier import load_classifier as load_classifier
    from .classifier import save_classifier as save_classifier
    from .config import ClassifierConfig as ClassifierConfig
    from .config import FitConfig as FitConfig
    from .lookahead import Lookahead as Lookahead
    from .loop import Batch as Batch
    from .loop import Task as Task
    from .loop import fit as fit

__all__ = [
    "Batch",
    "ClassifierConfig",
    "ClassifierTask",
    "FitConfig",
    "Lookahead",
    "Task",
    "TrainingAttack",
    "fit",
    "is_classifier",
    "load_classifier",
    "save_classifier",
]
__getattr__, __dir__ = lazy_exports(
    __name__,
    Batch=".loop",
    ClassifierConfig=".config",
    ClassifierTask=".classifier",
    FitConfig=".config",
    Lookahead=".lookahead",
    Task=".loop",
    TrainingAttack=".attack",
    fit=".loop",
    is_classifier=".classifier",
    load_classifier=".classifier",
    save_classifier=".classifier",
)
