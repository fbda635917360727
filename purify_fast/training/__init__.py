"""Training of the methods and of classifiers: the loop, its checkpoints and its schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .callbacks import Callback as Callback, TrainingState as TrainingState, summary as summary
    from .classifier import (
        ClassifierTask as ClassifierTask,
        is_classifier as is_classifier,
        load_classifier as load_classifier,
        save_classifier as save_classifier,
    )
    from .config import ClassifierConfig as ClassifierConfig, FitConfig as FitConfig, TrainingAttack as TrainingAttack
    from .loop import fit as fit
    from .optimizers import Lookahead as Lookahead
    from .task import Batch as Batch, Task as Task, Update as Update
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
