"""Every Triton kernel compiled ahead of time, without a GPU, and what the machine code must and must not hold."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.fail("ahead-of-time compilation needs a process without TRITON_INTERPRET=1", pytrace=False)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from purify_fast.kernels import (  # noqa: E402
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
from purify_fast.kernels._common import CHUNK, warps  # noqa: E402

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = ("fp32", "bf16", "fp16")
#: Sizes that large tensors have as multiples of 16.
DIVISIBLE = ("numel", "dim", "size", "classes", "plane", "width")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Case:
    """A kernel, the types of its arguments ("T" stands for the tensor's dtype) and its constants."""

    kernel: object
    arguments: str  # "name:type ...", in order
    constants: dict
    warps: int
    dtypes: tuple[str, ...] = DTYPES
    clamps: bool = False  # must propagate NaN
    fused: bool = True
    loads: bool = True  # reads tensors long enough for vector loads
    stores: bool = True
    id: str = field(default="")


def _cases() -> list[Case]:
    cases = []
    for kind, name in enumerate(("bits", "uniform", "normal")):
        arguments = "seed:*i64 ids:*i64 out:%s numel:i32 draws:i32 first_draw:i32 stream:i32 blocks:i32"
        cases.append(
            Case(
                philox._philox,
                arguments % ("*fp32" if kind else "*i32"),
                {"KIND": kind, "GROUPS": 256},
                warps(1024),
                ("fp32",),
                loads=False,
                id=f"philox-{name}",
            )
        )
    latent = {"STREAM": 1, "GROUPS": 64}
    cases += [
        Case(
            sample_latent._forward,
            "mu:*T logvar:*T seed:*i64 ids:*i64 z:*T kl:*fp32 dim:i32",
            latent,
            warps(256),
            id="sample_latent-forward",
        ),
        Case(
            sample_latent._backward,
            "dz:*T dkl:*fp32 mu:*T logvar:*T seed:*i64 ids:*i64 dmu:*T dlogvar:*T dim:i32",
            latent,
            warps(256),
            id="sample_latent-backward",
        ),
        Case(
            reconstruction_loss._forward,
            "logits:*T target:*T out:*fp32 size:i32 chunks:i32",
            {"LENGTH": CHUNK, "WIDTH": 1024},
            warps(1024),
            clamps=True,
            stores=False,
            id="reconstruction_loss-forward",
        ),
        Case(
            reconstruction_loss._add,
            "parts:*fp32 out:*fp32 chunks:i32",
            {"WIDTH": 128},
            1,
            ("fp32",),
            loads=False,  # a few partial sums
            stores=False,
            id="reconstruction_loss-add",
        ),
        Case(
            reconstruction_loss._backward,
            "grad:*fp32 logits:*T target:*T out:*T size:i32 blocks:i32",
            {"WIDTH": 1024},
            warps(1024),
            id="reconstruction_loss-backward",
        ),
    ]
    for layout, tile in (("contiguous", {"ROWS": 1, "WIDTH": 1024}), ("channels_last", {"ROWS": 8, "WIDTH": 128})):
        for direction, kernel, pointers in (
            ("forward", gated_elu._forward, "features:*T out:*T"),
            ("backward", gated_elu._backward, "grad:*T features:*T out:*T"),
        ):
            cases.append(
                Case(
                    kernel,
                    pointers + " rows:i32 size:i32 blocks:i32",
                    tile,
                    warps(1024),
                    id=f"gated_elu-{layout}-{direction}",
                )
            )
    # rows moved by single numbers have no vector loads
    row, grid = {"WIDTH": 1024}, "size:i32 height:i32 width:i32"
    for name, kernel, arguments, constants, dtypes in (
        ("patches", "_patches", f"x:*fp32 inverse:*fp32 out:*fp32 {grid}", {"SCALED": True}, ("fp32",)),
        ("patches-plain", "_patches", f"x:*fp32 inverse:*fp32 out:*fp32 {grid}", {"SCALED": False}, ("fp32",)),
        ("attend", "_attend", "x:*fp32 keep:*T out:*fp32 size:i32 width:i32 scale:S", {}, DTYPES),
        ("spread", "_spread", f"x:*fp32 out:*T {grid}", {}, DTYPES),
        ("gather", "_gather", f"grad:*T weights:*fp32 out:*fp32 {grid} scale:S", {}, DTYPES),
        (
            "scaled",
            "_scaled",
            f"x:*fp32 correlation:*fp32 inverse:*fp32 parts:*fp32 out:*fp32 {grid} blocks:i32",
            {"QUERIES": contextual_attention.QUERIES},
            ("fp32",),
        ),
    ):
        cases.append(
            Case(
                getattr(contextual_attention, kernel),
                arguments,
                {**constants, **row},
                contextual_attention.warps(1024),
                dtypes,
                loads=False,
                id=f"contextual_attention-{name}",
            )
        )
    step = "x:*T grad:*T nat:*T alpha:*fp32 eps:*fp32 out:*T size:i32 blocks:i32 lo:S hi:S"
    with_momentum = step.replace("alpha:", "previous:*T alpha:").replace("lo:", "momentum:S rest:S lo:")
    per_sample = step.replace("blocks:i32 ", "")
    sparse = step.replace("blocks:", "chosen:")
    for id, kernel, arguments, width in (
        ("pgd_step-linf", pgd_step._linf, step, 1024),
        ("pgd_step-l2", pgd_step._l2, per_sample, 2048),
        ("pgd_step-l1", pgd_step._l1, sparse, 2048),
        ("apgd_step-linf", apgd_step._linf, with_momentum, 1024),
        ("apgd_step-l2", apgd_step._l2, with_momentum, 2048),
    ):
        cases.append(Case(kernel, arguments, {"WIDTH": width}, warps(width), clamps=True, fused=False, id=id))
    for norm, kernel, arguments in ((1, pgd_step._l2_whole, per_sample), (2, pgd_step._l1_whole, sparse)):
        for width in (4096, pgd_step.WHOLE[norm]):
            id = f"pgd_step-l{3 - norm}-whole-{width}"
            count = pgd_step.whole_warps(width)
            cases.append(Case(kernel, arguments, {"WIDTH": width}, count, clamps=True, fused=False, id=id))
    cases += _transforms()
    cases += _distances()
    tile = {"K": 8, "C": 256}
    for method in ("LSE", "MEAN", "PROBABILITY"):
        constants = {"METHOD": getattr(aggregate, method).value, **tile}
        for direction, kernel, pointers in (
            ("forward", aggregate._columns, "logits:*T out:*fp32"),
            ("backward", aggregate._columns_backward, "grad:*fp32 logits:*T out:*T"),
        ):
            cases.append(
                Case(
                    kernel,
                    pointers + " samples:i32 classes:i32 tiles:i32",
                    constants,
                    warps(2048),
                    clamps=method == "PROBABILITY",
                    loads=(method, direction) != ("MEAN", "backward"),
                    stores=direction == "backward",
                    id=f"aggregate-{method.lower()}-{direction}",
                )
            )
    for name, kernel, pointers in (
        ("peel-forward", aggregate._peel, "logits:*T out:*fp32"),
        ("peel-backward", aggregate._peel_backward, "grad:*fp32 logits:*T out:*T"),
        ("vote-forward", aggregate._vote, "logits:*T out:*fp32"),
    ):
        cases.append(
            Case(
                kernel,
                pointers + " samples:i32 classes:i32",
                tile,
                warps(2048),
                clamps="peel" in name,
                stores=name == "peel-backward",
                id=f"aggregate-{name}",
            )
        )
    return cases


def _transforms() -> list[Case]:
    cases = [
        Case(
            random_transform._owners,
            "seed:*i64 ids:*i64 out:*u8 batch:i32 blocks:i32 tiles:i32 cut:i32",
            {"PARTITION": partition, "SHARED": shared, "STREAM": random_transform.MASK, "WIDTH": 64},
            warps(64 * 64),
            ("fp32",),
            loads=False,  # keys are drawn
            stores=False,  # a byte for each of 64 blocks
            id=f"random_transform-{name}",
        )
        for name, partition, shared in (("missing", False, False), ("parts", True, True))
    ]
    sizes = " sigma:S batch:i32 channels:i32 plane:i32 width:i32 block:i32 columns:i32 blocks:i32 tiles:i32"
    sizes += " samples:i32 parts:i32 first_part:i32"
    pointers = "x:*T owners:*u8 seed:*i64 ids:*i64 out:*T"
    layouts = (("", False, ("fp32", "bf16")), ("-channels_last", True, ("bf16",)))
    for name, last, dtypes in layouts:
        constants = {"NOISE": True, "CHANNELS_LAST": last, "ALIGNED": True}
        constants |= {"STREAM": random_transform.TRANSFORM_NOISE, "GROUPS": 256}
        cases += [
            Case(
                random_transform._forward,
                pointers + sizes,
                constants,
                warps(1024),
                dtypes,
                clamps=True,
                fused=False,
                stores=not last,  # from one pixel to the next are all planes
                id=f"random_transform-forward{name}",
            ),
            Case(
                random_transform._backward,
                "grad:*T " + pointers + sizes,
                constants,
                warps(1024),
                dtypes,
                fused=False,
                id=f"random_transform-backward{name}",
            ),
        ]
    sizes = " size:i32 channels:i32 plane:i32 width:i32 tall:i32 wide:i32 columns:i32 blocks:i32 passes:i32 tiles:i32"
    for name, last, dtypes in layouts:
        constants = {"CHANNELS_LAST": last, "WIDTH": 1024}
        cases += [
            Case(
                stitch._forward,
                "images:*T owners:*u8 out:*T" + sizes,
                constants,
                warps(1024),
                dtypes,
                loads=False,  # neighbours may be of two passes
                id=f"stitch-forward{name}",
            ),
            Case(
                stitch._backward,
                "grad:*T owners:*u8 out:*T" + sizes,
                constants,
                warps(1024),
                dtypes,
                id=f"stitch-backward{name}",
            ),
        ]
    return cases


def _distances() -> list[Case]:
    cases = [
        Case(
            representation_distance._sums,
            "student:*T teacher:*T out:*fp32 size:i32 chunks:i32",
            {"DIFFERENCE": difference, "LENGTH": CHUNK, "WIDTH": 1024},
            warps(1024),
            stores=False,
            id=f"representation_distance-{name}",
        )
        for name, difference in (("products", False), ("squares", True))
    ]
    cases += [
        Case(
            representation_distance._measure,
            "parts:*fp32 out:*fp32 slopes:*fp32 chunks:i32 layers:i32 layer:i32",
            {"KIND": kind, "WIDTH": representation_distance.PARTS},
            1,
            ("fp32",),
            clamps=name != "l2",
            loads=False,  # a few partial sums
            stores=False,
            id=f"representation_distance-{name}",
        )
        for kind, name in enumerate(("abs_cosine", "cosine", "angular", "l2"))
    ]
    return [
        *cases,
        Case(
            representation_distance._backward,
            "grad:*fp32 student:*T teacher:*T slopes:*fp32 out:*T size:i32 blocks:i32 layers:i32 layer:i32",
            {"WIDTH": 1024},
            warps(1024),
            id="representation_distance-backward",
        ),
        Case(
            noisy_replay._forward,
            "x:*T adv:*T drift:*fp32 tau:*fp32 eps:*fp32 seed:*i64 ids:*i64 out:*T size:i32 blocks:i32 lo:S hi:S",
            {"STREAM": noisy_replay.REPLAY_NOISE, "GROUPS": 256},
            warps(1024),
            clamps=True,
            fused=False,
            id="noisy_replay",
        ),
    ]


CASES = _cases()


@cache
def compiled(case_id: str, dtype: str, architecture: int, scalar: str = "fp32"):
    """The compiled kernel with every pointer and size divisible by 16, as large tensors are."""
    case = next(case for case in CASES if case.id == case_id)
    signature, attributes = {}, {}
    for position, (argument, name) in enumerate(zip(case.arguments.split(), case.kernel.arg_names, strict=False)):
        kind = argument.split(":")[1].replace("T", dtype).replace("S", scalar)
        signature[name] = kind
        if kind.startswith("*") or argument.split(":")[0] in DIVISIBLE:
            attributes[(position,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(case.constants, "constexpr")
    assert list(signature) == list(case.kernel.arg_names), "the case's arguments are not the kernel's"
    source = ASTSource(case.kernel, signature, dict(case.constants), attributes)
    options = {"num_warps": case.warps} | ({} if case.fused else {"enable_fp_fusion": False})
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


EVERY = [pytest.param(c, d, id=f"{c.id}-{d}") for c in CASES for d in c.dtypes]


def test_every_kernel_has_a_case():
    """A jitted function that a launcher starts, one with a name `_x_ptr` first argument, is compiled here."""
    modules = (
        aggregate, apgd_step, contextual_attention, gated_elu, noisy_replay, pgd_step, philox, random_transform,
        reconstruction_loss, representation_distance, sample_latent, stitch,
    )  # fmt: skip
    entry = {
        (module.__name__, name)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction)
        and value.arg_names[0].endswith("_ptr")
        and "out_ptr" in value.arg_names
    } | {(sample_latent.__name__, "_forward"), (sample_latent.__name__, "_backward")}
    assert entry == {(case.kernel.__module__, case.kernel.__name__) for case in CASES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_compiles_without_spills_or_doubles(case, dtype, architecture, tmp_path):
    kernel = compiled(case.id, dtype, architecture)
    assert len(kernel.asm["cubin"]) > 0
    ptx = kernel.asm["ptx"]
    assert ".f64" not in ptx
    assert not re.search(r"\.local\b|__local_depot|\b[ls]d\.local", ptx)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert re.search(r"\bSTACK:0\b.*\bLOCAL:0\b", usage), usage


@pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(c, d, id=f"{c.id}-{d}") for c in CASES if ":S" in c.arguments for d in c.dtypes]
)
def test_double_scalars_stay_out_of_the_arithmetic(case, dtype):
    """The compiler may declare a Python float as fp64: it must be narrowed once, and nothing else computed in it."""
    ptx = compiled(case.id, dtype, 90, scalar="fp64").asm["ptx"]
    wide = {line.split()[0] for line in re.findall(r"^\s*(\S*\.f64\S*.*)$", ptx, re.M)}
    assert wide <= {"cvt.rn.f32.f64"}, wide


@pytest.mark.parametrize(("case", "dtype"), [p for p in EVERY if p.values[0].clamps])
def test_clamps_propagate_nan(case, dtype):
    ptx = compiled(case.id, dtype, 90).asm["ptx"]
    assert re.search(r"\b(max|min)\.NaN\.f32", ptx)
    if " lo:S" in case.arguments:
        assert re.search(r"\bmax\.NaN\.f32", ptx) and re.search(r"\bmin\.NaN\.f32", ptx)


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_memory_access_is_vectorised(case, dtype):
    ptx = compiled(case.id, dtype, 90).asm["ptx"]
    if case.loads:
        assert re.search(r"ld\.global[\w.:]*\.v[248]", ptx), "no vector load"
    if case.stores:
        assert re.search(r"st\.global[\w.:]*\.v[248]", ptx), "no vector store"


WHOLE = [case for case in CASES if "-whole-" in case.id]


@pytest.mark.parametrize(("case", "dtype"), [pytest.param(c, d, id=f"{c.id}-{d}") for c in WHOLE for d in c.dtypes])
def test_a_sample_that_fits_is_read_once(case, dtype):
    """Three images, each in vectors of sixteen bytes; the step and the radius."""
    ptx = compiled(case.id, dtype, 90).asm["ptx"]
    thread = case.constants["WIDTH"] // (32 * case.warps) * (4 if dtype == "fp32" else 2)  # bytes of one image
    assert len(re.findall(r"\bld\.global", ptx)) == 3 * thread // 16 + 2


EXACT = (
    "pgd_step-linf",
    "apgd_step-linf",
    "random_transform-forward",
    "random_transform-backward",
    "noisy_replay",
)


@pytest.mark.parametrize(
    ("kernel", "dtype"), [pytest.param(c.id, d, id=f"{c.id}-{d}") for c in CASES if c.id in EXACT for d in c.dtypes]
)
def test_exact_kernels_have_no_fused_multiply_add(kernel, dtype):
    assert not re.search(r"\bfma\.rn\.f32", compiled(kernel, dtype, 90).asm["ptx"])
