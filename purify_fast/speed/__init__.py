"""Making a frozen model fast: inference copies, BatchNorm folding, compiled regions, the memory allocator."""

from .allocator import keep_memory
from .folding import fold_batchnorm
from .inference_copy import FrozenView

__all__ = ["FrozenView", "fold_batchnorm", "keep_memory"]
