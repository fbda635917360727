"""Every Triton kernel compiled ahead of time, without a GPU, and what the machine code must and must not hold.

A case calls a launcher, so that what is compiled is what it launches: block, warps and the types of the arguments, with
every size and pointer a multiple of 16, as large tensors have them.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.fail("ahead-of-time compilation needs a process without TRITON_INTERPRET=1", pytrace=False)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from purify_fast.kernels import (  # noqa: E402
    _common,
    aggregate,
    apgd_step,
    contextual_attention,
    gated_elu,
    noisy_replay,
    pgd_step,
    philox,
    random_transform,
    reconstruction_loss,
    representation_distance,
    sample_latent,
    stitch,
)
from purify_fast.ops.aggregate import METHODS  # noqa: E402
from purify_fast.ops.apgd_step import NORMS as APGD_NORMS  # noqa: E402
from purify_fast.ops.pgd_step import NORMS  # noqa: E402
from purify_fast.ops.representation_distance import KINDS  # noqa: E402

MODULES = (
    aggregate, apgd_step, contextual_attention, gated_elu, noisy_replay, pgd_step, philox, random_transform,
    reconstruction_loss, representation_distance, sample_latent, stitch,
)  # fmt: skip
ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

one = torch.empty  # float32
SEED, IDS = torch.zeros(1, dtype=torch.int64), torch.arange(4)


def x(*shape: int, last: bool = False) -> Callable:
    """An argument of a case: a tensor of its dtype."""
    return lambda dtype: torch.empty(shape, dtype=dtype, memory_format=_common.memory_format(last))


def _made(arguments: list, dtype: torch.dtype) -> list:
    return [_made(a, dtype) if isinstance(a, list) else a(dtype) if callable(a) else a for a in arguments]


def _cases() -> dict[str, tuple]:
    """By name: a launcher and its arguments."""
    image, latent, rows = x(4, 3, 64, 64), x(4, 1024), one(4)
    cases = {
        "sample_latent-forward": (sample_latent.forward, latent, latent, SEED, IDS),
        "sample_latent-backward": (sample_latent.backward, latent, rows, latent, latent, SEED, IDS),
        "reconstruction_loss-forward": (reconstruction_loss.forward, image, image),
        "reconstruction_loss-backward": (reconstruction_loss.backward, rows, image, image),
        "noisy_replay": (noisy_replay.forward, image, image, rows, one(1), rows, SEED, IDS, 0.0, 1.0),
    }
    for kind, name in enumerate(("bits", "uniform", "normal")):
        cases[f"philox-{name}"] = (philox.philox, SEED, IDS, 4096, 2, kind)
    for norm, name in enumerate(NORMS):
        whole = [4096, pgd_step.WHOLE[norm]] if norm else []
        shapes = {"": (3, 128, 128)} | {f"-whole-{size}": (size,) for size in whole}
        for kind, shape in shapes.items():
            cases[f"pgd_step-{name}{kind}"] = (
                pgd_step.forward, *[x(4, *shape)] * 3, rows, rows, norm, 0.0, 1.0, 0.05
            )  # fmt: skip
        if name in APGD_NORMS:
            cases[f"apgd_step-{name}"] = (apgd_step.forward, *[image] * 4, rows, rows, 0.75, norm, 0.0, 1.0)
    for method, name in enumerate(METHODS):
        logits = x(4, 8, 1024)
        cases[f"aggregate-{name}-forward"] = (aggregate.forward, logits, method)
        if name != "vote":  # has no gradient
            cases[f"aggregate-{name}-backward"] = (aggregate.backward, one(4, 1024), logits, method)

    wide, narrow = x(4, 8, 64, 64), x(4, 4, 64, 64)
    cases["gated_elu-forward"] = (gated_elu.forward, wide, 1)
    cases["gated_elu-backward"] = (gated_elu.backward, narrow, wide, 1)
    wide, narrow = x(4, 64, 64, 64), x(4, 64, 64, 32)
    cases["gated_elu-forward-channels_last"] = (gated_elu.forward, wide, 3)
    cases["gated_elu-backward-channels_last"] = (gated_elu.backward, narrow, wide, 3)

    pairs, norms, grid = one(2, 1024, 1024), one(2, 1024), (32, 32, 10.0)
    cases["contextual_attention-forward"] = (contextual_attention.forward, pairs, norms, x(2, 1024), *grid)
    grad = x(2, 4, 1024, 1024)
    cases["contextual_attention-backward"] = (contextual_attention.backward, grad, pairs, norms, pairs, *grid)

    owners, quarters = (torch.zeros((1, 4, n, n), dtype=torch.uint8) for n in (8, 2))
    for last, layout in ((False, ""), (True, "-channels_last")):
        for mask, masked_blocks, num_passes in (("masked", 16, 0), ("passes", 0, 4)):
            mask_of, out = (8, masked_blocks, num_passes, 1, num_passes > 0), (lambda dtype: dtype, last)
            cases[f"random_transform-forward-{mask}{layout}"] = (
                random_transform.forward, one(4, 3, 64, 64), SEED, IDS, 0.25, *mask_of, *out
            )  # fmt: skip
        cases[f"random_transform-backward{layout}"] = (
            random_transform.backward, x(4, 5, 64, 64, last=last), one(4, 3, 64, 64), owners, SEED, IDS, 0.25, 0
        )  # fmt: skip
        cases[f"stitch-forward{layout}"] = (stitch.forward, x(16, 3, 64, 64, last=last), quarters, 4)
        cases[f"stitch-backward{layout}"] = (stitch.backward, x(4, 3, 64, 64, last=last), quarters, 4)

    few, many = [x(4, 512), one(4, 1024)], [x(4, 512), one(4, 1024), x(4, 64, 16, 16)]  # one and several chunks
    for kind, name in enumerate(KINDS):
        cases[f"representation_distance-{name}"] = (representation_distance.forward, few, few, kind)
        if name in ("abs_cosine", "l2"):  # products and squares
            cases[f"representation_distance-{name}-chunks"] = (representation_distance.forward, many, many, kind)
    slopes = one(4, 3, 2)
    cases["representation_distance-backward"] = (representation_distance.backward, one(4, 3), many, many, slopes)
    return cases


CASES = _cases()
#: The cases that launch the same for every dtype.
FLOAT32 = ("philox-*",)


def every(chosen: Callable[[str], bool] = lambda case: True):
    """The parameters of a test of each case that is chosen, in each dtype."""
    own = [
        pytest.param(case, dtype, id=f"{case}-{dtype}")
        for case in filter(chosen, CASES)
        for dtype in DTYPES
        if dtype == "fp32" or not matches(case, FLOAT32)
    ]
    return pytest.mark.parametrize(("case", "dtype"), own)


def matches(case: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(case, pattern) for pattern in patterns)


class Device:
    """What the compiler asks a driver for; the number of the device keeps the compiled kernels of each apart."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0


def _run(case: str, dtype: str, architecture: int, start: Callable) -> list:
    """What ``start`` makes of every launch of the case, on such a device."""
    results = []
    launch, *arguments = CASES[case]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", lambda *args, **kwargs: results.append(start(*args, **kwargs)))
        patch.setattr(driver, "_active", Device(architecture))
        patch.setattr(_common, "_major", lambda device: architecture // 10)
        launch(*_made(arguments, DTYPES[dtype]))
    return results


@cache
def launched(case: str, dtype: str, architecture: int) -> list:
    """The kernels that the launcher starts, compiled and not run."""
    run = triton.JITFunction.run
    return _run(case, dtype, architecture, lambda *args, **kwargs: run(*args, **kwargs | {"warmup": True}))


def name_of(function: triton.JITFunction) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def test_every_kernel_has_a_case():
    """A jitted function that no other one calls is started by a launcher."""
    source = "".join(map(inspect.getsource, MODULES))
    entries = {
        name_of(function)
        for module in MODULES
        for name, function in vars(module).items()
        if isinstance(function, triton.JITFunction) and function.__module__ == module.__name__
        if not re.search(rf"(?<!def )\b{name}\(", source)
    }
    assert entries == {name for case in CASES for name in _run(case, "fp32", 90, lambda fn, *_, **__: name_of(fn))}


@pytest.mark.parametrize(
    ("case", "launches"),
    [("abs_cosine", ["_forward"]), ("abs_cosine-chunks", ["_forward", "_add"]), ("backward", ["_backward"])],
)
def test_layers_share_their_launches(case, launches):
    names = _run(f"representation_distance-{case}", "bf16", 90, lambda function, *_, **__: function.__name__)
    assert names == launches


#: What adds, and so must be launched the same on every device, or is too small to be launched otherwise.
FIXED = (
    "*_step-l[12]*", "aggregate-*", "contextual_attention-*", "reconstruction_loss-forward",
    "representation_distance-[acl]*", "sample_latent-forward",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_only_elementwise_tiles_depend_on_the_device(case):
    ninety, hundred = (_run(case, "fp32", device, lambda *_, grid, **tile: (grid, tile)) for device in (90, 100))
    assert (ninety == hundred) == matches(case, FIXED)


#: Registers of a thread, where they are more than 128.
REGISTERS = {
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@every()
def test_compiles_without_spills_or_doubles(case, dtype, architecture, tmp_path):
    for kernel in launched(case, dtype, architecture):
        name, ptx, cubin = name_of(kernel.src.fn), kernel.asm["ptx"], tmp_path / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(re.search(rf"\b{of}:(\d+)", usage)[1]) for of in ("REG", "STACK", "LOCAL"))
        assert registers <= REGISTERS.get(name, 128), (name, usage)
        assert stack == local == 0, (name, usage)  # spills
        assert not re.search(r"\.f64|\.local\b|__local_depot", ptx), name


#: Where a thread cannot read or write 16 bytes at once: kernel or case, instruction, the bytes that it may, and why.
NARROW = (
    ("contextual_attention.*", "ld", {2, 4, 8}, "rows moved by single numbers, and four keys for a thread"),
    ("contextual_attention._spread", "st", {8}, "four keys for a thread"),
    ("*._add", "ld", {4}, "a few partial sums"),
    ("aggregate.*", "ld", {8}, "gradients of the classes: two for a thread, which has eight samples of each"),
    ("aggregate.*", "st", {8}, "results for the classes, likewise"),
    ("random_transform._owners", "st", {1}, "64 blocks"),
    ("random_transform.*", "ld", {1}, "the owner of every pixel's block"),
    ("random_transform-forward-*-channels_last", "st", {2, 4}, "from one pixel to the next are all planes"),
    ("random_transform-backward-channels_last", "ld", {2, 4}, "likewise"),
    ("stitch.*", "ld", {1}, "the owner of every pixel's block"),
    ("stitch-forward*", "ld", {2, 4}, "neighbours may be of two passes"),
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@every()
def test_threads_move_16_bytes(case, dtype, architecture):
    """All but single numbers: what a whole program reads or writes once, such as a seed."""
    for kernel in launched(case, dtype, architecture):
        name, ptx, ir = name_of(kernel.src.fn), kernel.asm["ptx"], kernel.asm["ttgir"]
        for instruction, operation in (("ld", "load"), ("st", "store")):
            moves = re.findall(rf"\b{instruction}\.global\b[\w.:]*?(?:\.v(\d))?\.b(\d+)\s", ptx)
            assert len(moves) == len(re.findall(rf"\b{instruction}\.global\b", ptx)), "an instruction was not read"
            allowed = set().union(*(
                sizes
                for pattern, of, sizes, _why in NARROW
                if of == instruction and (fnmatch(name, pattern) or fnmatch(case, pattern))
            ))  # fmt: skip
            narrow = [size for n, bits in moves if (size := int(n or 1) * int(bits) // 8) < 16 and size not in allowed]
            single = re.findall(rf"tt\.{operation} .* : !tt\.ptr<", ir)
            assert len(narrow) <= len(single), (name, instruction, narrow)


@every(lambda case: any(isinstance(argument, float) for argument in CASES[case]))
def test_double_scalars_are_narrowed_at_once(case, dtype):
    """The compiler may declare a Python float as fp64: it is narrowed, and nothing else computed in it."""
    for kernel in launched(case, dtype, 90):
        source = kernel.src
        signature = {name: "fp64" if kind == "fp32" else kind for name, kind in source.signature.items()}
        if signature == source.signature:
            continue  # one of two takes no float
        doubled = ASTSource(source.fn, signature, source.constants, source.attrs)
        options = {option: getattr(kernel.metadata, option) for option in ("num_warps", "enable_fp_fusion")}
        ptx = triton.compile(doubled, target=kernel.metadata.target, options=options).asm["ptx"]
        assert set(re.findall(r"^\s*(\S*\.f64\S*)", ptx, re.M)) == {"cvt.rn.f32.f64"}, name_of(source.fn)


#: Kernels that clamp, and the clamps that must propagate NaN.
CLAMPS = {
    "aggregate-peel-*": ("min",),
    "aggregate-mean_sigmoid-*": ("min",),
    "apgd_step-*": ("max", "min"),
    "noisy_replay": ("max", "min"),
    "pgd_step-*": ("max", "min"),
    "random_transform-forward-*": ("max", "min"),
    "reconstruction_loss-forward": ("max",),
    "representation_distance-a*": ("max", "min"),
    "representation_distance-cosine*": ("max", "min"),
}


@every(lambda case: matches(case, CLAMPS))
def test_clamps_propagate_nan(case, dtype):
    ptx = "".join(kernel.asm["ptx"] for kernel in launched(case, dtype, 90))
    (clamps,) = (clamps for pattern, clamps in CLAMPS.items() if fnmatch(case, pattern))
    for clamp in clamps:
        assert re.search(rf"\b{clamp}\.NaN\.f32", ptx), clamp


@every(lambda case: "-whole-" in case)
def test_a_sample_that_fits_is_read_once(case, dtype):
    """Three images, each in vectors of sixteen bytes; the step and the radius."""
    (tile,) = _run(case, dtype, 90, lambda *_, grid, **tile: tile)
    (kernel,) = launched(case, dtype, 90)
    thread = tile["WIDTH"] // (32 * tile["num_warps"]) * DTYPES[dtype].itemsize  # bytes of one image
    assert len(re.findall(r"\bld\.global", kernel.asm["ptx"])) == 3 * thread // 16 + 2


#: Bit-exact against the reference, so that no product may be fused with a sum.
EXACT = ("pgd_step-linf", "apgd_step-linf", "random_transform-*", "noisy_replay")


@every(lambda case: matches(case, EXACT))
def test_exact_kernels_have_no_fused_multiply_add(case, dtype):
    for kernel in launched(case, dtype, 90):
        assert not re.search(r"\bfma\.rn\.f32", kernel.asm["ptx"]), name_of(kernel.src.fn)
