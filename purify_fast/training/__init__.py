"""Training of the methods and of classifiers: the loop, its checkpoints and its schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .bank import BankConfig as BankConfig
    from .callbacks import Callback as Callback
    from .callbacks import TrainingState as TrainingState
    from .callbacks import summary as summary
    from .classifier import ClassifierTask as ClassifierTask
    from .classifier import is_classifier as is_classifier
    from .classifier import load_classifier as load_classifier
    from .classifier import save_classifier as save_classifier
    from .config import ClassifierConfig as ClassifierConfig
    from .config import FitConfig as FitConfig
    from .config import TrainingAttack as TrainingAttack
    from .loop import fit as fit
    from .optimizers import Lookahead as Lookahead
    from .task import Batch as Batch
    from .task import Task as Task
    from .task import Update as Update
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
