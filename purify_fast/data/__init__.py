"""Data sets as uint8 tensors, and what a loop needs of them: floats, shuffled batches, augmentation on the device."""

from .augment import crop_flip
from .batches import batches
from .datasets import DataSet, load, to_float
from .statistics import statistics
from .streaming import StreamedImages, read_ahead

__all__ = ["DataSet", "StreamedImages", "batches", "crop_flip", "load", "read_ahead", "statistics", "to_float"]
