"""Data sets as uint8 tensors, and what a loop needs of them: floats, shuffled batches, augmentation on the device."""

from .augment import crop_flip
from .batches import batches
from .datasets import DataSet, load_dataset, to_float
from .statistics import statistics
from .streaming import StreamedImages, read_ahead
from .subset import balanced_subset

__all__ = [
    "DataSet",
    "StreamedImages",
    "balanced_subset",
    "batches",
    "crop_flip",
    "load_dataset",
    "read_ahead",
    "statistics",
    "to_float",
]
