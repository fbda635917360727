"""Compile every Triton kernel ahead of time, without a GPU, and read its machine code."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from purify_fast.kernels import _common
from purify_fast.kernels.decoder_sizes import Geometry
from purify_fast.methods.carso.networks import published_decoder
from purify_fast.ops import REGISTRY
from purify_fast.ops.aggregate import METHODS
from purify_fast.ops.apgd_step import NORMS as APGD_NORMS
from purify_fast.ops.attack_loss import KINDS as LOSSES
from purify_fast.ops.pgd_step import NORMS
from purify_fast.ops.representation_distance import KINDS

#: The modules of kernels, by the names of their files.
MODULES = {
    path.stem: import_module(f"purify_fast.kernels.{path.stem}")
    for path in sorted(Path(_common.__file__).parent.glob("[a-z]*.py"))
}
ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: The folder of the disassemblers that are part of Triton.
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

#: A function that makes a tensor of the given shape in float32, whatever the dtype of the case is.
one = torch.empty
SEED, IDS = torch.zeros(1, dtype=torch.int64), torch.arange(4)


def x(*shape: int, last: bool = False) -> Callable:
    """Return a function that makes an argument of a case: a tensor in the dtype of the case."""
    return lambda dtype: torch.empty(shape, dtype=dtype, memory_format=_common.memory_format(last))


def _made(arguments: Sequence, dtype: torch.dtype) -> list:
    return [_made(a, dtype) if isinstance(a, list) else a(dtype) if callable(a) else a for a in arguments]


def _cases() -> dict[str, tuple]:
    """Return the launcher's arguments for each case. The name of a case begins with the name of the op."""
    image, latent, rows = x(4, 3, 64, 64), x(4, 1024), one(4)
    cases = {
        "sample_latent-forward": (latent, latent, SEED, IDS),
        "sample_latent-backward": (latent, rows, latent, latent, SEED, IDS),
        "reconstruction_loss-forward": (image, image),
        "reconstruction_loss-backward": (rows, image, image),
    }
    for kind, name in enumerate(("bits", "uniform", "normal")):
        cases[f"philox-{name}"] = (SEED, IDS, 4096, 2, kind)
    for norm, name in enumerate(NORMS):
        whole = [4096, MODULES["pgd_step"].WHOLE[norm]] if norm else []
        shapes = {"": (3, 128, 128)} | {f"-whole-{size}": (size,) for size in whole}
        for kind, shape in shapes.items():
            cases[f"pgd_step-{name}{kind}"] = (*[x(4, *shape)] * 3, rows, rows, norm, 0.0, 1.0, 0.05)
        pattern, edge = one(2, 10, 10) if norm else None, torch.empty((), dtype=torch.int64)
        cases[f"square_proposal-{name}"] = (image, image, rows, one(4, 8, 8), pattern, edge, norm, 0.0, 1.0)
        held = x(4, 3, 32, 32)
        cases[f"square_proposal-{name}-held"] = (held, held, rows, one(4, 8, 8), pattern, edge, norm, 0.0, 1.0)
        # The compiler makes constants of arguments that are 1.
        flat, pattern = x(4, 3, 1, 64), one(2, 1, 1) if norm else None
        cases[f"square_proposal-{name}-flat"] = (flat, flat, rows, one(4, 8, 8), pattern, edge, norm, 0.0, 1.0)
        cases[f"hyperplane_projection-{name}"] = (held, held, rows, norm, 0.0, 1.0)
        if name in APGD_NORMS:
            cases[f"apgd_step-{name}"] = (*[image] * 4, rows, rows, 0.75, norm, 0.0, 1.0)
    of_copy = image, x(4, 3, 64, 64, last=True), image
    cases["pgd_step-linf-channels_last"] = (*of_copy, rows, rows, 0, 0.0, 1.0, 0.05)
    cases["apgd_step-linf-channels_last"] = (*of_copy, image, rows, rows, 0.75, 0, 0.0, 1.0)
    for method, name in enumerate(METHODS):
        # A program has some of the many classes of an image, or the few classes of several images.
        for classes, kind in ((1024, ""), (10, "-few")):
            if kind and name in ("peel", "vote"):
                continue
            logits = x(4, 8, classes)
            cases[f"aggregate-{name}-forward{kind}"] = (logits, method)
            # The method "vote" has no gradient.
            if name != "vote":
                cases[f"aggregate-{name}-backward{kind}"] = (one(4, classes), logits, method)

    # These losses have the code of all others. A program has one row, several rows, or a part of a row.
    for name in ("ce", "scaled_margin", "dlr_targeted"):
        classes_of = torch.zeros((4, 2) if name.endswith("_targeted") else 4, dtype=torch.int64)
        for classes, kind in ((1024, ""), (10, "-few"), (21504, "-blocks")):
            cases[f"attack_loss-{name}{kind}"] = (x(4, classes), classes_of, LOSSES.index(name), False)

    pairs, norms, grid = one(2, 1024, 1024), one(2, 1024), (32, 32, 10.0)
    cases["contextual_attention-forward"] = (pairs, norms, x(2, 1024), *grid)
    grad = x(2, 4, 1024, 1024)
    cases["contextual_attention-backward"] = (grad, pairs, norms, pairs, *grid)

    for learned, channels in (("fixed", 3), ("learned", 6)):
        for last, layout in ((False, ""), (True, "-channels_last")):
            state, named = one(4, 3, 64, 64), (one(4, 8), SEED, IDS, IDS, SEED, True)
            given = (state, x(4, channels, 64, 64, last=last), *named)
            cases[f"diffusion_step-forward-{learned}{layout}"] = given
            cases[f"diffusion_step-backward-{learned}{layout}"] = (state, *given)
    cases["diffusion_step-forward-noiseless"] = (state, x(4, 3, 64, 64), *named[:-1], False)

    cases["noisy_replay"] = (image, image, rows, one(()), rows, SEED, IDS, 0.0, 1.0)
    # The dimension of the channels is the last one for channels_last.
    for shape, dim, layout in (((4, 96, 16, 16), 1, ""), ((4, 16, 16, 48), 3, "-channels_last")):
        grad = list(shape)
        grad[dim] //= 2
        cases[f"gated_elu-forward{layout}"] = (x(*shape), dim)
        cases[f"gated_elu-backward{layout}"] = (x(*grad), x(*shape), dim)

    owners, quarters = (torch.zeros((1, 4, n, n), dtype=torch.uint8) for n in (8, 2))
    for last, layout in ((False, ""), (True, "-channels_last")):
        for mask, masked_blocks, num_passes in (("masked", 16, 0), ("passes", 0, 4)):
            mask_of, out = (8, masked_blocks, num_passes, 1, num_passes > 0), (lambda dtype: dtype, last)
            cases[f"random_transform-forward-{mask}{layout}"] = (one(4, 3, 64, 64), SEED, IDS, 0.25, *mask_of, *out)
        grad, images = x(4, 5, 64, 64, last=last), one(4, 3, 64, 64)
        cases[f"random_transform-backward{layout}"] = (grad, images, owners, SEED, IDS, 0.25, 0)
        cases[f"stitch-forward{layout}"] = (x(16, 3, 64, 64, last=last), quarters, 4)
        cases[f"stitch-backward{layout}"] = (x(4, 3, 64, 64, last=last), quarters, 4)

    # The tensors of `few` fit into one chunk of the kernel, and those of `many` need several chunks.
    few, many = [x(4, 512), one(4, 1024)], [x(4, 512), one(4, 1024), x(4, 64, 16, 16)]
    for kind, name in enumerate(KINDS):
        cases[f"representation_distance-{name}"] = (few, few, kind)
        # The kernel for chunks differs for these two kinds, which need products and squares.
        if name in ("abs_cosine", "l2"):
            cases[f"representation_distance-{name}-chunks"] = (many, many, kind)
    slopes = one(4, 3, 2)
    cases |= _decoders()
    cases["representation_distance-backward"] = (one(4, 3), many, many, slopes)
    return cases


def _no_half(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float16 else dtype


def no_half(*shape: int) -> Callable:
    """Return a function that makes an argument of an op without float16. It uses bfloat16 in place of float16."""
    return lambda dtype: torch.empty(shape, dtype=_no_half(dtype))


def _decoders() -> dict[str, tuple]:
    """Return the cases of CARSO's decoders for images of 32 x 32 and of 64 x 64 pixels."""
    cases = {}
    for name, latent, side in (("cifar10", 128, 32), ("tiny_imagenet", 192, 64)):
        start, plan = published_decoder((3, side, side))
        numbers, (_, h, w) = [latent, *start], start
        for layer in plan:
            h, w = layer.size(h, w)
            numbers += [layer.channels, layer.kernel, layer.stride, layer.padding, h, w]
        weights, shifts = Geometry.of(numbers).sizes()
        words = sum(map(math.prod, Geometry.of(numbers).inputs())) // 32
        # Many samples fill the largest tiles. Few get smaller ones.
        for samples, kind in ((1024, ""), (64, "-few")) if side == 32 else ((1024, ""),):
            given = no_half(weights), one(shifts), numbers, 16, 0.2, True
            drawn = one(samples // 16, math.prod(start)), SEED, torch.arange(samples // 16)
            cases[f"decode_samples-{name}-forward{kind}"] = (*drawn, *given, False, lambda dtype: _no_half(dtype), True)
            if side == 32:
                pictures, signs = no_half(samples, 3, side, side), torch.empty(samples, words, dtype=torch.int32)
                cases[f"decode_samples-{name}-backward{kind}"] = (pictures, pictures, signs, *given)
    return cases


CASES = _cases()


class Device:
    """A replacement for the GPU driver, with the facts that the compiler needs."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0


def run(case: str, dtype: str, architecture: int, start: Callable) -> list:
    """Call the launcher of a case. ``start`` replaces every launch of a kernel. Return the results of ``start``."""
    results: list = []
    op = case.partition("-")[0] + ("_backward" if "-backward" in case else "")
    with recorded(architecture, lambda *args, **kwargs: results.append(start(*args, **kwargs))):
        REGISTRY[op].launch(*_made(CASES[case], DTYPES[dtype]))
    return results


@contextmanager
def recorded(architecture: int, start: Callable) -> Iterator[None]:
    """Within the block, launchers find a device of an architecture, and ``start`` replaces every launch."""
    run = mock.patch.object(triton.JITFunction, "run", lambda *args, **kwargs: start(*args, **kwargs))
    major = mock.patch.object(_common, "_major", lambda device: architecture // 10)
    with run, major, mock.patch.object(driver, "_active", Device(architecture)):
        yield


@cache
def launched(case: str, dtype: str, architecture: int) -> list:
    """Compile the kernels of a case for an architecture without running them, and return them."""
    compiled = triton.JITFunction.run
    return run(case, dtype, architecture, lambda *args, **kwargs: compiled(*args, **kwargs | {"warmup": True}))


def name_of(function: triton.JITFunction) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


@dataclass(frozen=True)
class Code:
    """The machine code of a kernel, and its loops."""

    instructions: tuple[str, ...]  # SASS, without addresses and without the padding at the end
    loops: tuple[tuple[int, int], ...]  # begin and end, at a branch back, as indices of instructions

    def executed(self, *trips: int) -> int:
        """Return the number of instructions that a thread executes if no branch skips instructions."""
        depth = [sum(first <= at < end for first, end in self.loops) for at in range(len(self.instructions))]
        return sum(math.prod(trips[:nested]) for nested in depth)


def _tool(name: str, *arguments: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> dict[str, int]:
    """Return a thread's number of registers (REG), bytes of stack (STACK) and bytes of local memory (LOCAL)."""
    text = _tool("cuobjdump", "-res-usage", cubin=cubin)
    return {of: int(re.search(rf"\b{of}:(\d+)", text)[1]) for of in ("REG", "STACK", "LOCAL")}


def parsed(sass: str) -> Code:
    """Return the instructions and the loops in the output of nvdisasm."""
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        if instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    while code and re.match(r"NOP|BRA `\(\.L_x_\d+\)$", code[-1]):
        code.pop()
    branches = [(at, re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", one)) for at, one in enumerate(code)]
    loops = [(labels[to[1]], at + 1) for at, to in branches if to and labels[to[1]] <= at]
    return Code(tuple(code), tuple(loops))


@cache
def code(case: str, dtype: str, architecture: int = 90) -> dict[str, Code]:
    """Return the machine code of the kernels that a case launches, by the names of the kernels."""
    kernels = launched(case, dtype, architecture)
    return {name_of(kernel.src.fn): parsed(_tool("nvdisasm", "-c", cubin=kernel.asm["cubin"])) for kernel in kernels}
