"""What the methods' training shares: the loop, checkpoints, schedules, and the training of classifiers."""

from ..speed.allocator import keep_memory
from .attack import TrainingAttack
from .classifier import ClassifierConfig, ClassifierTask, load_classifier, save_classifier
from .lookahead import Lookahead
from .loop import Batch, FitConfig, Task, fit

__all__ = [
    "Batch",
    "ClassifierConfig",
    "ClassifierTask",
    "FitConfig",
    "Lookahead",
    "Task",
    "TrainingAttack",
    "fit",
    "keep_memory",
    "load_classifier",
    "save_classifier",
]
