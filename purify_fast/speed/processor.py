"""Tells whether the processor is fast in bfloat16, and chooses the precision of a training by that."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any, TypeVar

import torch

from ..ops.dispatch.records import processor

logger = logging.getLogger("purify_fast")

Config = TypeVar("Config", bound=Any)


def _multiplies_bfloat16() -> bool:
    """Return True if the CPU is fast in bfloat16, which variables of PyTorch and oneDNN can forbid.

    The instructions of AVX-512 alone do not make it fast: on a Xeon with them and without tiles (AMX), a product of
    matrices took 1.6 times as long as in float32. On AMD's processors they do.
    """
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    tiles = torch.cpu._is_amx_tile_supported() and any(name in most for name in ("AMX", "ALL", "DEFAULT"))
    allowed = any(name in most for name in ("AMX", "ALL", "DEFAULT", "BF16", "FP16", "AVX10"))
    plain = os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2") or not allowed
    return not plain and torch.cpu._is_avx512_bf16_supported() and (tiles or processor().startswith("AMD"))


def fast_bfloat16(device: torch.device) -> bool:
    """Return True if a CPU or a GPU multiplies bfloat16 faster than float32, by its instructions."""
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _multiplies_bfloat16()


def with_known_precision(config: Config, device: torch.device) -> Config:
    """Replace the precision "auto" in a training's settings by "bfloat16" or "float32", and log the choice."""
    if config.precision != "auto":
        return config
    chosen = "bfloat16" if fast_bfloat16(device) else "float32"
    logger.info("the precision of the training is %s", chosen)
    return dataclasses.replace(config, precision=chosen)
