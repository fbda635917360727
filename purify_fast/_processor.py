"""Tells what the processor can. All code that depends on its instructions asks the functions of this file.

PyTorch's variable ATEN_CPU_CAPABILITY and oneDNN's variable ONEDNN_MAX_CPU_ISA also lower these answers.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from typing import Any, TypeVar

import torch

logger = logging.getLogger("purify_fast")

Config = TypeVar("Config", bound=Any)

#: A CPU is fast in bfloat16 if a product of matrices takes less than this share of the time in float32. The
#: instructions alone do not tell: on a Xeon with AVX512-BF16 and without tiles, it took 1.6 times as long.
FASTER = 0.8


@functools.cache
def cpu_features() -> frozenset[str]:
    """Return what the CPU can do in bfloat16."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    plain = os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2")
    tiles = not plain and any(name in most for name in ("AMX", "ALL", "DEFAULT"))
    pairs = tiles or (not plain and any(name in most for name in ("BF16", "FP16", "AVX10")))
    found = {
        "avx512_bf16": pairs and torch.cpu._is_avx512_bf16_supported(),
        "amx_tile": tiles and torch.cpu._is_amx_tile_supported(),
        "onednn": torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    return frozenset(name for name, there in found.items() if there)


def fast_bfloat16(device: torch.device) -> bool:
    """Tell whether a CPU or a GPU multiplies bfloat16 faster than float32. A CPU is timed once."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "avx512_bf16" in cpu_features() and _measured_ratio() < FASTER


def has_tiles() -> bool:
    """Tell whether the processor has matrix tiles (AMX) for bfloat16."""
    return "amx_tile" in cpu_features()


def onednn_takes_bfloat16() -> bool:
    """Tell whether oneDNN accepts weights in bfloat16 on this processor."""
    return "onednn" in cpu_features()


def with_known_precision(config: Config, device: torch.device) -> Config:
    """Replace the precision "auto" in a training's settings by "bfloat16" or "float32", and log the choice."""
    if config.precision != "auto":
        return config
    chosen = "bfloat16" if fast_bfloat16(device) else "float32"
    logger.info("the precision of the training is %s", chosen)
    return dataclasses.replace(config, precision=chosen)


@functools.cache
@torch.inference_mode()
def _measured_ratio() -> float:
    """The time of a product of matrices in bfloat16, as a share of its time in float32."""
    fastest = dict[torch.dtype, float]()
    for _ in range(10):
        for dtype in (torch.float32, torch.bfloat16):
            # Other work makes some runs slower, so the kinds alternate, and the fastest run of each counts.
            a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            begin = time.perf_counter()
            torch.mm(a, b)
            fastest[dtype] = min(fastest.get(dtype, float("inf")), time.perf_counter() - begin)
    return fastest[torch.bfloat16] / fastest[torch.float32]
