"""The meaning of ``float32`` on a GPU, and the algorithms by which cuDNN computes it.

By default PyTorch rounds the operands of convolutions there to ten bits (TF32).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .._validation import CudnnBenchmark, check_literal

#: The number of blocks of `float32_products` in which the process is.
_blocks = 0
#: The parts of PyTorch that have a precision of their own among the newer names of these settings.
_NAMES = ("conv", "rnn", "matmul")


def float32_settings() -> tuple[tuple[bool, str] | None, list[str]]:
    """The current meaning of float32.

    Returns:
        cuDNN's ``allow_tf32`` and the precision of float32 matrix products, or None if PyTorch's older names cannot say
        it; and by the newer names the precision of convolutions, recurrent layers and matrix products.
    """
    # PyTorch has older and newer names for these settings. The older names cannot be read if only the newer names can
    # express the present values, and writing them overwrites the newer ones. So both are restored, the newer ones last.
    # The newer setting of recurrent layers has no public name.
    values = [torch._C._get_fp32_precision_getter("cuda", name) for name in _NAMES]
    older: tuple[bool, str] | None = None
    with contextlib.suppress(RuntimeError):
        older = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    return older, values


@contextlib.contextmanager
def float32_products(*, tf32: bool = False) -> Iterator[None]:
    """Within the block, compute float32 convolutions and matrix products on a GPU as the caller asks.

    The settings are the process's, so that a second thread sees them too. The CPU has none of this.

    Args:
        tf32: round the operands to ten bits of mantissa, which is several times faster; the input gradients of a small
            network then err by about 1e-2. By default products are those of IEEE float32, as on a CPU.
    """
    global _blocks
    older, values = float32_settings()
    _blocks += 1
    try:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        yield
    finally:
        _blocks -= 1
        if older is not None:
            torch.backends.cudnn.allow_tf32, _ = older
            torch.set_float32_matmul_precision(older[1])
        for name, value in zip(_NAMES, values, strict=True):
            torch._C._set_fp32_precision_setter("cuda", name, value)


@contextlib.contextmanager
def whole_float32_by_default() -> Iterator[None]:
    """`float32_products`, unless the caller has chosen already by a block of it; also a decorator."""
    with contextlib.nullcontext() if _blocks else float32_products():
        yield


@contextlib.contextmanager
def raced_convolutions(mode: CudnnBenchmark, device: torch.device) -> Iterator[None]:
    """Within the block, cuDNN races its algorithms once for each shape of a convolution; the old setting then returns.

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
