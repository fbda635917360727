"""Making a frozen model fast: inference copies, BatchNorm folding, compiled regions, the memory allocator."""

from .accelerated import Accelerated
from .allocator import retain_freed_memory
from .compiled_region import CompiledRegion
from .folding.batchnorm import fold_batchnorm
from .folding.inference_copy import InferenceCopy
from .graphs.step_graphs import StepGraphs

__all__ = ["Accelerated", "CompiledRegion", "InferenceCopy", "StepGraphs", "fold_batchnorm", "retain_freed_memory"]
