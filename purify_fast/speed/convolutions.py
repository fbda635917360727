"""cuDNN's choice of an algorithm, by a race at the first convolution of each shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .._validation import CudnnBenchmark as CudnnBenchmark
from .._validation import check_literal


@contextlib.contextmanager
def raced_convolutions(mode: CudnnBenchmark, device: torch.device) -> Iterator[None]:
    """Within the block, cuDNN races its algorithms once for each shape of a convolution; afterwards as before.

    A race takes about a second for a network and shape, so that shapes should repeat. The algorithms differ in the last
    bits of their results, and which one wins may differ from run to run.

    Args:
        mode: "auto" races on a CUDA device, unless the process asks for deterministic algorithms; "on" races there
            whatever the process asks for; "off" leaves cuDNN as it is.
        device: where the work is done.
    """
    check_literal("mode", mode, CudnnBenchmark)
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    if device.type != "cuda" or mode == "off" or (mode == "auto" and deterministic):
        yield
        return
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before
