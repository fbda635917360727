"""Tells whether the processor is fast in bfloat16, and chooses the precision of a training by that."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from typing import Any, TypeVar

import torch
from torch.nn.grad import conv2d_input

from ..ops.dispatch import records

logger = logging.getLogger("purify_fast")

Config = TypeVar("Config", bound=Any)

#: A CPU is fast in bfloat16 if a convolution takes less than this share of the time in float32. The instructions alone
#: do not tell: on a Xeon with AVX512-BF16 and without tiles, a product of matrices took 1.6 times as long.
FASTER = 0.8
#: The name of the measured ratio in the file of the machine.
RATIO = "bfloat16_by_float32"


def _multiplies_bfloat16() -> bool:
    """Tell whether the CPU has instructions for bfloat16, which variables of PyTorch and oneDNN can forbid."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    plain = os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2")
    allowed = any(name in most for name in ("AMX", "ALL", "DEFAULT", "BF16", "FP16", "AVX10"))
    return not plain and allowed and torch.cpu._is_avx512_bf16_supported()


def fast_bfloat16(device: torch.device) -> bool:
    """Tell whether a CPU or a GPU multiplies bfloat16 faster than float32.

    A CPU is timed once. The answer is kept beside the verdicts on kernels, so that every process has the same answer,
    also beside other work.
    """
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _multiplies_bfloat16() and _kept_ratio(device) < FASTER


@functools.cache
def _kept_ratio(device: torch.device) -> float:
    kept = records.read(device).get(RATIO)
    if isinstance(kept, float):
        return kept
    measured = _measured_ratio()
    try:
        records.update(device, {}, write=True, **{RATIO: measured})
    except OSError as error:
        logger.warning("each process times bfloat16 itself, and may choose another precision: %s", error)
    return measured


def with_known_precision(config: Config, device: torch.device) -> Config:
    """Replace the precision "auto" in a training's settings by "bfloat16" or "float32", and log the choice."""
    if config.precision != "auto":
        return config
    chosen = "bfloat16" if fast_bfloat16(device) else "float32"
    logger.info("the precision of the training is %s", chosen)
    return dataclasses.replace(config, precision=chosen)


@torch.inference_mode()
def _measured_ratio() -> float:
    """The time of a small convolution and its gradient in bfloat16, as a share of their time in float32."""
    last = torch.channels_last
    fastest = dict[torch.dtype, float]()
    for _ in range(10):
        for dtype in (torch.float32, torch.bfloat16):
            # Other work makes some runs slower, so the kinds alternate, and the fastest run of each counts.
            x = torch.ones(8, 64, 16, 16, dtype=dtype).contiguous(memory_format=last)
            weight = torch.ones(64, 64, 3, 3, dtype=dtype).contiguous(memory_format=last)
            begin = time.perf_counter()
            conv2d_input(x.shape, weight, torch.conv2d(x, weight, padding=1), padding=1)
            fastest[dtype] = min(fastest.get(dtype, float("inf")), time.perf_counter() - begin)
    return fastest[torch.bfloat16] / fastest[torch.float32]
