"""Making a frozen model fast: inference copies, BatchNorm folding, captured steps, the memory allocator."""

import ctypes
import sys

from .folding.batchnorm import fold_batchnorm
from .folding.inference_copy import Accelerated, CompiledRegion, InferenceCopy
from .graphs.step_graphs import StepGraphs

__all__ = ["Accelerated", "CompiledRegion", "InferenceCopy", "StepGraphs", "fold_batchnorm", "retain_freed_memory"]

#: The numbers of two settings of glibc's allocator (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def retain_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of giving every large tensor's pages back to the system.

    Without this setting, half of a plain float32 forward pass on a CPU was spent in page faults. The setting holds for
    the whole process, which then keeps its peak of CPU memory. The command line calls this function; a user of the
    library decides.

    Returns:
        True if it took effect (Linux with glibc), False elsewhere.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    # Only glibc has this function.
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
