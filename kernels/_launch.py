"""The launch of a kernel on the device of its tensors."""

from __future__ import annotations

from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, enable_fp_fusion: bool, **options: Any) -> None:
    """Launch a kernel on the device of its tensors, in the current stream of this device.

    Args:
        kernel: a function with the decorator ``triton.jit``.
        grid: numbers of programs along one to three axes.
        args: arguments of the kernel. The first is a tensor, or a tuple of tensors.
        enable_fp_fusion: whether the compiler fuses a product and a sum into one instruction, which rounds once. Each
            launch chooses, because the last bits of a result must not follow the default of Triton's version.
        options: compile-time constants of the kernel by their names, and options of the compiler such as ``num_warps``.
    """
    first = args[0]
    # CPU tensors, which Triton's interpreter gets, have the index -1. For it the context manager does nothing.
    with torch.cuda.device((first[0] if type(first) is tuple else first).get_device()):
        kernel[grid](*args, enable_fp_fusion=enable_fp_fusion, **options)
