"""Speed up frozen models: inference copies, folded BatchNorms, CUDA graphs of steps, and the memory allocator."""

import ctypes
import sys

from .folding.batchnorm import fold_batchnorm
from .folding.inference_copy import InferenceCopy
from .graphs.graphed_loop import StepGraphs

__all__ = ["InferenceCopy", "StepGraphs", "fold_batchnorm", "retain_freed_memory"]

#: The numbers of two settings of glibc's allocator (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def retain_freed_memory() -> bool:
    """Let glibc keep freed memory for later tensors instead of returning it to the system.

    Without this setting, half of the time of a plain float32 forward pass on a CPU was spent in page faults. The
    setting affects the whole process, whose memory then hardly shrinks after its peak. The command line calls this
    function. In your own program, call it if you want this effect.

    Returns:
        True if the setting was changed (on Linux with glibc), or else False.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    # Only glibc has `mallopt`, so on other systems it is None.
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
