"""Load data sets as uint8 tensors, convert images to floats, make shuffled batches, and augment them on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .datasets import DataSet as DataSet, load_dataset as load_dataset, read_image as read_image
    from .images import (
        balanced_subset as balanced_subset,
        batches as batches,
        crop_flip as crop_flip,
        statistics as statistics,
        to_float as to_float,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
