"""Set the precision of float32 products on a GPU (by default TF32 for convolutions), and cuDNN's algorithms."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._validation import CudnnBenchmark, check_literal
from ..ops.dispatch.records import processor
from .copying import deep_copy, freeze
from .draws import same_draws
from .eager_mode import EagerDispatchMode

#: The number of blocks of `float32_products` that the process has entered and not left.
_blocks = 0
#: The parts of PyTorch that have separate precisions in its newer settings.
_NAMES = ("conv", "rnn", "matmul")


def float32_settings() -> tuple[tuple[bool, str] | None, list[str]]:
    """The current settings of float32 products.

    Returns:
        Two values: cuDNN's ``allow_tf32`` with the precision of float32 matrix products (None if PyTorch's older names
        cannot express the settings), and the precisions of convolutions, recurrent layers and matrix products.
    """
    # PyTorch has older and newer names for these settings. Reading an older name raises an error if only the newer
    # names can express the current values. Writing an older name overwrites the newer settings. So both are restored,
    # the newer settings last. The newer setting of recurrent layers has no public name.
    values = [torch._C._get_fp32_precision_getter("cuda", name) for name in _NAMES]
    older: tuple[bool, str] | None = None
    with contextlib.suppress(RuntimeError):
        older = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    return older, values


@contextlib.contextmanager
def float32_products(*, tf32: bool = False) -> Iterator[None]:
    """Set the precision of float32 convolutions and matrix products on a GPU within the block, for all threads.

    Args:
        tf32: whether to round the operands to ten bits of mantissa. This is several times faster, but the input
            gradients of a small network then have errors of about 1e-2. Otherwise, products are in IEEE float32.
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
    """Compute float32 products in IEEE float32 within the block, unless a block of `float32_products` surrounds it.

    This function can also be used as a decorator.
    """
    with contextlib.nullcontext() if _blocks else float32_products():
        yield


@contextlib.contextmanager
def raced_convolutions(mode: CudnnBenchmark, device: torch.device) -> Iterator[None]:
    """Let cuDNN time its algorithms within the block, once for each shape of a convolution, and use the fastest.

    The timing takes about a second for each network and shape. The results of the algorithms differ in the last bits,
    and the choice may differ between runs.

    Args:
        mode: "on": cuDNN times its algorithms on a CUDA device. "auto": only if PyTorch does not require deterministic
            algorithms. "off": cuDNN's setting is not changed.
        device: device of the work.
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


# -- tells whether the processor is fast in bfloat16, and chooses the precision of a training by that ------------------

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


# -- products ----------------------------------------------------------------------------------------------------------

#: A CPU is faster in bfloat16 for a model with at least this many dense products per computed value, and in a batch of
#: at least PRODUCTS. In table `elsewhere_copies` of docs/speed.md, the networks have 13 to 68 or 81 to 995 per value.
PER_VALUE, PRODUCTS = 75, 250e6
#: A convolution with fewer input or output channels is too thin for the processor's instructions.
CHANNELS = 16


class Counter(EagerDispatchMode):
    """Counts the products of dense layers, and the computed values."""

    products = values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = function(*args, **(kwargs or {})), function._schema.name.removeprefix("aten::")
        if isinstance(result, Tensor) and not function.is_view:
            self.values += result.numel()
            if name in ("mm", "addmm", "bmm", "baddbmm"):
                self.products += result.numel() * args[name in ("addmm", "baddbmm")].shape[-1]
            elif name == "convolution" and args[8] == 1 and min(args[1].shape[:2]) >= CHANNELS:
                self.products += result.numel() * args[1][0].numel()
        return result


def is_dense(model: nn.Module, x: Tensor) -> bool:
    """Return True if a model has so many dense products, on a batch of images, that a CPU is faster in bfloat16.

    A copy of the model predicts one image. A model that fails here is not dense; its next call shows the error.
    """
    with contextlib.suppress(Exception), torch.inference_mode(False), torch.no_grad(), same_draws(model):
        copied = freeze(deep_copy(model))
        # The weights that were copied are no computed values.
        with Counter() as counted:
            copied(x[:1])
        return bool(counted.products >= PER_VALUE * counted.values and len(x) * counted.products >= PRODUCTS)
    return False
