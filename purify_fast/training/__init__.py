"""What the methods' training shares: the loop, checkpoints, schedules, and the training of classifiers."""

from .classifier import ClassifierConfig, ClassifierTask
from .loop import Batch, FitConfig, Task, fit

__all__ = ["Batch", "ClassifierConfig", "ClassifierTask", "FitConfig", "Task", "fit"]
