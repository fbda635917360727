"""Every Triton kernel compiles without a GPU; what its launches and its machine code must and must not hold. The
tests for AMD, and of what is compiled to verify kernels, follow."""

import inspect
import os
import re
import threading
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from unittest import mock

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.fail("ahead-of-time compilation needs a process without TRITON_INTERPRET=1", pytrace=False)

import torch  # noqa: E402
from ahead import (  # noqa: E402
    ARCHITECTURES,
    CASES,
    DTYPES,
    MODULES,
    Device,
    code,
    launched,
    name_of,
    recorded,
    run,
    usage,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from purify_fast.kernels import _ahead, _common, sample_latent  # noqa: E402
from purify_fast.ops import REGISTRY  # noqa: E402
from purify_fast.ops.dispatch.verify import cases  # noqa: E402

#: Otherwise: sm_90 in float32 and bfloat16, sm_120 in bfloat16, and machine code in bfloat16.
ALL = os.environ.get("PURIFY_FAST_TEST_ARCHITECTURES") == "all"


def architectures_of(dtype: str) -> tuple[int, ...]:
    return ARCHITECTURES if ALL else (90, 120) if dtype == "bf16" else (90,)


#: Float16 takes the instructions of bfloat16, and its values are tested in Triton's interpreter.
COMPILED = tuple(DTYPES) if ALL else ("fp32", "bf16")
#: The cases that launch the same for every dtype.
FLOAT32 = ("philox-*",)
#: The cases that are compiled in bfloat16 alone, since what users call is: in float32, one test compiles them.
BFLOAT16 = ("decode_samples-*",)


def every(chosen: Callable[[str], bool] = lambda case: True):
    """The parameters of a test of each case that is chosen, in each dtype."""
    own = [
        pytest.param(case, dtype, id=f"{case}-{dtype}")
        for case in filter(chosen, CASES)
        for dtype in COMPILED
        if dtype == "fp32" or not matches(case, FLOAT32)
        if dtype == "bf16" or not matches(case, BFLOAT16)
    ]
    return pytest.mark.parametrize(("case", "dtype"), own)


def matches(case: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(case, pattern) for pattern in patterns)


def test_every_kernel_has_a_case():
    """A jitted function that no other one calls is started by a launcher."""
    source = "".join(map(inspect.getsource, MODULES.values()))
    entries = {
        name_of(function)
        for module in MODULES.values()
        for name, function in vars(module).items()
        if isinstance(function, triton.JITFunction) and function.__module__ == module.__name__
        if not re.search(rf"(?<!def )\b{name}\(", source)
    }
    assert entries == started_by_cases()


@pytest.mark.slow
def test_every_kernel_is_verified():
    """Before a kernel serves, a machine verifies an op's examples, which launches every kernel that calls launch."""
    assert started_by_examples() == started_by_cases()


def started_by_cases() -> set[str]:
    return {
        name
        for case in CASES
        for dtype in ("fp32", "bf16")
        for name in run(case, dtype, 90, lambda fn, *_, **__: name_of(fn))
    }


def started_by_examples() -> set[str]:
    names: set[str] = set()
    with recorded(90, lambda fn, *_, **__: names.add(name_of(fn))), torch.no_grad():
        for op in REGISTRY.values():
            for example in op.examples if op.launch is not None else ():
                for dtype in example.dtypes:
                    op.launch(*example.make(dtype, 0))
    return names


#: What adds, and so must be launched the same on every device, or is too small to be launched otherwise.
FIXED = (
    "*_step-l[12]*",
    "aggregate-*",
    "attack_loss-*",
    "contextual_attention-*",
    "decode_samples-*",
    "hyperplane_projection-*",
    "reconstruction_loss-forward",
    "representation_distance-[acl]*",
    "sample_latent-forward",
    "square_proposal-l[12]*",
    "square_proposal-linf-flat",
    "random_transform-*-channels_last",
)


def test_only_elementwise_tiles_depend_on_the_device():
    for case in CASES:
        ninety, hundred = (run(case, "fp32", device, lambda *_, grid, **tile: (grid, tile)) for device in (90, 100))
        assert (ninety == hundred) == matches(case, FIXED), case


#: Kernels in which a version of Triton keeps a few bytes of a thread in memory, outside of loops: kernel, architecture.
#: The assembler then has more programs on a multiprocessor. With triton 3.9, these bytes are the index of the program,
#: which is read once for each layer, and a pair of numbers that is read once.
SPILLS = {
    "3.6": {("contextual_attention._scaled", 80): 8, ("attack_loss._forward", 90): 8, ("apgd_step._l2", 100): 8},
    "3.9": {("representation_distance._forward", 90): 8, ("random_transform._backward", 120): 8},
}


#: The most registers of a thread, where more would leave half of a multiprocessor idle.
REGISTERS = {"random_transform._owners": 64}


@every()
def test_compiles_without_spills_or_doubles(case, dtype):
    for architecture in architectures_of(dtype):
        for kernel in launched(case, dtype, architecture):
            name, used = name_of(kernel.src.fn), usage(kernel.asm["cubin"])
            allowed = SPILLS.get(triton.__version__.rpartition(".")[0], {}).get((name, architecture), 0)
            assert used["STACK"] <= allowed and used["LOCAL"] == 0, (name, used, architecture)  # spills
            assert used["REG"] <= REGISTERS.get(name, 255), (name, used, architecture)
            assert not re.search(r"\.f64|\.local\b|__local_depot", kernel.asm["ptx"]), (name, architecture)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("aggregate-") and "peel" in case])
def test_a_difference_from_the_maximum_is_not_fused(case):
    """S - max S must be 0 where S is the largest; fused with the product that S is, it is what rounding left of it."""
    assert [kernel.metadata.enable_fp_fusion for kernel in launched(case, "fp32", 90)] == [False]


@pytest.mark.parametrize("case", CASES)
def test_every_launch_says_whether_products_and_sums_are_fused(case):
    """Triton's default differs between its versions, and decides the last bits of a result."""
    chosen = run(case, "bf16", 90, lambda *_, **options: options.get("enable_fp_fusion"))
    assert chosen and all(type(one) is bool for one in chosen)


@pytest.mark.parametrize("case", [case for case in CASES if any(isinstance(each, float) for each in CASES[case])])
def test_double_scalars_are_narrowed_at_once(case):
    """The compiler may declare a Python float as fp64: it is narrowed, and nothing else computed in it."""
    for kernel in launched(case, "bf16", 90):
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
    "apgd_step-*": ("max", "min"),
    "diffusion_step-forward-*": ("max", "min"),
    "noisy_replay": ("max", "min"),
    "pgd_step-*": ("max", "min"),
    "random_transform-forward-*": ("max", "min"),
    "square_proposal-*": ("max", "min"),
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


#: Bit-exact against the reference, so that no product may be fused with a sum.
EXACT = ("*pgd_step-linf*", "square_proposal-linf", "random_transform-*", "noisy_replay", "diffusion_step-*")
#: Of these, those that draw normals; `random_transform` beside the blocks of its masks.
NORMALS = ("random_transform-*", "diffusion_step-forward-[fl]*", "diffusion_step-backward-learned*")
FUSED = r"\bfma\.rn\.f32"


@every(lambda case: matches(case, EXACT))
def test_exact_kernels_have_no_fused_multiply_add(case, dtype):
    """But for those of the normals, which are the same in every kernel: to the bit those of the op `philox`."""
    (alone,) = launched("philox-normal", "fp32", 90)
    of_normals = len(re.findall(FUSED, alone.asm["ptx"])) // 4
    for kernel in launched(case, dtype, 90):
        normal = matches(case, NORMALS) and name_of(kernel.src.fn) != "random_transform._owners"
        wide = dtype == "fp32" or matches(case, ("diffusion_step-*-channels_last",))
        elements = 4 if wide else 8  # of a thread
        if matches(case, ("random_transform-*-channels_last",)):
            elements *= 3  # channels
        fused = len(re.findall(FUSED, kernel.asm["ptx"]))
        assert fused == (of_normals * elements if normal else 0), name_of(kernel.src.fn)


#: Most instructions that a thread of sm_90 executes, by case and dtype: for 8 elements in bfloat16, for 4 numbers of
#: philox, for 8 latents, for 16 logits of many classes or 8 of few, for 4 numbers of attention, and for 16 pixels of
#: Square. A few percent above what the compilers of triton 3.6 and 3.8 make of the kernels.
BUDGETS = {
    ("stitch-forward", "bf16"): 135,
    ("stitch-forward-channels_last", "bf16"): 120,
    ("stitch-backward", "bf16"): 345,
    ("random_transform-forward-masked", "bf16"): 600,
    ("random_transform-forward-masked-channels_last", "fp32"): 890,
    ("random_transform-forward-masked-channels_last", "bf16"): 1450,
    ("random_transform-backward-channels_last", "bf16"): 1520,
    ("diffusion_step-forward-fixed", "bf16"): 550,
    ("diffusion_step-forward-learned", "bf16"): 680,
    ("diffusion_step-forward-noiseless", "bf16"): 160,
    ("diffusion_step-backward-fixed", "bf16"): 226,
    ("diffusion_step-backward-learned", "bf16"): 770,
    ("gated_elu-forward", "bf16"): 330,
    ("gated_elu-backward", "bf16"): 490,
    ("contextual_attention-forward", "fp32"): 784,
    ("contextual_attention-forward", "bf16"): 817,
    ("contextual_attention-backward", "bf16"): 1150,
    ("philox-bits", "fp32"): 115,
    ("philox-normal", "fp32"): 210,
    ("sample_latent-forward", "fp32"): 590,
    ("sample_latent-backward", "bf16"): 660,
    ("noisy_replay", "bf16"): 335,
    ("aggregate-lse-forward", "fp32"): 440,
    ("aggregate-lse-forward-few", "fp32"): 212,
    ("aggregate-mean-forward", "fp32"): 165,
    ("aggregate-mean-forward", "bf16"): 218,
    ("aggregate-mean-backward", "fp32"): 115,
    ("aggregate-mean-backward", "bf16"): 105,
    ("aggregate-mean-forward-few", "fp32"): 134,
    ("aggregate-mean-forward-few", "bf16"): 142,
    ("aggregate-mean-backward-few", "fp32"): 118,
    ("aggregate-mean-backward-few", "bf16"): 124,
    ("aggregate-mean_sigmoid-forward", "fp32"): 1075,
    ("aggregate-mean_sigmoid-backward", "fp32"): 860,
    ("attack_loss-ce", "fp32"): 725,
    ("attack_loss-ce-few", "fp32"): 2060,
    ("attack_loss-dlr_targeted", "bf16"): 940,
    ("pgd_step-linf", "bf16"): 330,
    ("apgd_step-linf", "bf16"): 430,
    ("square_proposal-l2-held", "fp32"): 1215,
    ("square_proposal-l1-held", "fp32"): 1640,
    ("square_proposal-linf", "bf16"): 295,
    ("hyperplane_projection-linf", "bf16"): 825,
    ("reconstruction_loss-forward", "bf16"): 775,
    ("reconstruction_loss-backward", "bf16"): 202,
    ("representation_distance-abs_cosine", "bf16"): 975,
    ("representation_distance-backward", "bf16"): 352,
}
#: The instructions of these depend on the layers of a decoder.
WITHOUT_BUDGET = {"decode_samples"}


#: The iterations of the loops of attention, from the outermost loop inward, where they are not four.
TRIPS = {"contextual_attention._scaled": (8,), "contextual_attention._gather": (4, 2)}
#: The kernel that computes on the few blocks of a mask. The count per element leaves it out.
APART = "random_transform._owners"


def instructions(case: str, dtype: str) -> int:
    """The instructions of all kernels of a case; where a loop computes several times the elements, of one trip."""
    usual, total = (4,) if case.startswith("contextual_attention") else (1,), 0.0
    for name, kernel in code(case, dtype).items():
        trips = TRIPS.get(name, usual)
        total += kernel.executed(*trips) / trips[0] if name != APART else 0
    return round(total)


@pytest.mark.parametrize("op", [name for name, op in REGISTRY.items() if op.launch and not name.endswith("_backward")])
def test_every_op_has_a_budget(op):
    counted = {case.partition("-")[0] for case, _ in BUDGETS}
    assert op in counted | WITHOUT_BUDGET, f"BUDGETS has no case of {op}: docs/extend.md, An op, step 7"


#: Budgets whose test is not slow: machine code takes long to read. `make cuda-check` looks at all of them.
QUICK = [(case, "bf16") for case in ("aggregate-mean-forward", "gated_elu-forward", "noisy_replay", "pgd_step-linf")]


BUDGET_CASES = [pytest.param(*budget, marks=[pytest.mark.slow] * (budget not in QUICK)) for budget in BUDGETS]


@pytest.mark.parametrize(("case", "dtype"), BUDGET_CASES, ids=str)
def test_instructions(case, dtype):
    assert (got := instructions(case, dtype)) <= BUDGETS[case, dtype], got


def test_the_decoder_in_float32_spills_nothing():
    for case in ("decode_samples-cifar10-forward", "decode_samples-cifar10-backward"):
        for kernel in launched(case, "fp32", 90):
            used = usage(kernel.asm["cubin"])
            assert used["STACK"] == used["LOCAL"] == 0 and used["REG"] <= 128


# -- two GPUs of AMD ---------------------------------------------------------------------------------------------------
# All kernels compile for two GPUs of AMD. None has run there: this says that Triton's other compiler takes them.

#: The accelerators MI200 and MI300.
AMD_GPUS = ("gfx90a", "gfx942")
#: Those that compile in seconds: an elementwise kernel, one with a limit of registers, and one with random numbers.
FEW = ("gated_elu-forward", "pgd_step-l1-whole-4096", "philox-normal")


class Amd(Device):
    """A replacement for the driver of an AMD GPU, with the facts that the compiler needs."""

    def get_current_target(self):
        return GPUTarget("hip", self.architecture, 64)


@pytest.mark.parametrize("architecture", AMD_GPUS)
@pytest.mark.parametrize("case", [pytest.param(one, marks=() if one in FEW else pytest.mark.slow) for one in CASES])
def test_compiles_for_amd(monkeypatch, case, architecture):
    """In machine code, and without memory for registers that a thread lacks."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    compiled = triton.JITFunction.run

    def start(*args, **kwargs):
        monkeypatch.setattr(driver, "_active", Amd(architecture))
        return compiled(*args, **kwargs | {"warmup": True})

    kernels = run(case, "bf16", 90, start)
    assert kernels
    for kernel in kernels:
        code = kernel.asm["amdgcn"]
        assert architecture in code and kernel.asm["hsaco"]
        assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", code) == ["0"], name_of(kernel.src.fn)


# -- kernels that are compiled for verification ------------------------------------------------------------------------
# How many kernels a GPU compiles to verify them: counted by the keys under which Triton keeps what it compiled.

ARCHITECTURE, GPU = 90, torch.device("cuda")
GPU_OPS = [name for name, op in REGISTRY.items() if op.launch is not None]


def compiled(ops: Iterable[str]) -> set[tuple]:
    """The keys of the kernels that verifying these ops compiles; nothing is compiled here."""
    keys: set[tuple] = set()

    def start(function, *args, grid, **kwargs):
        *_, bind = function.device_caches[ARCHITECTURE]
        _, specialization, options = bind(*args, **kwargs, debug=False)
        keys.add((name_of(function), str(specialization), str(sorted(options.items()))))

    with recorded(ARCHITECTURE, start), torch.no_grad():
        for name in ops:
            for example, own in cases(REGISTRY[name], GPU):
                REGISTRY[name].launch(*example.make(own, 0))
    return keys


def test_all_kernels_are_verified_by_143_compiles():
    found = compiled(GPU_OPS)
    assert 0 < len(found) <= 143, len(found)


@pytest.mark.parametrize("op", GPU_OPS)
def test_every_dtype_variant_and_kernel_is_verified(op):
    every = [(one, dtype) for one in REGISTRY[op].examples for dtype in one.dtypes]
    table = cases(REGISTRY[op], GPU)
    assert {dtype for _, dtype in table} == {dtype for _, dtype in every}
    assert {example.variant for example, _ in table} == {example.variant for example, _ in every}
    launched: list[set[str]] = []
    for chosen in (every, table):
        names: set[str] = set()
        with recorded(ARCHITECTURE, lambda fn, *_, names=names, **__: names.add(name_of(fn))), torch.no_grad():
            for example, dtype in chosen:
                REGISTRY[op].launch(*example.make(dtype, 0))
        launched.append(names)
    assert launched[0] == launched[1]


def test_kernels_are_compiled_side_by_side_and_none_runs(monkeypatch):
    """The launchers return as they do, other threads launch as ever, and what was compiled is there for the launch."""
    functions = (sample_latent._forward, sample_latent._backward)
    makers, ran, meanwhile = set(), [], []
    real = triton.compiler.compile
    barrier = threading.Barrier(2, timeout=600)

    def slow(*args, **kwargs):
        makers.add(threading.get_ident())
        barrier.wait()  # passes only if both are compiled at the same time
        return real(*args, **kwargs)

    def launch() -> None:
        latent, rows, seed, ids = torch.empty(4, 48), torch.empty(4), torch.zeros(1, dtype=torch.int64), torch.arange(4)
        sample_latent.forward(latent, latent, seed, ids)
        sample_latent.backward(latent, rows, latent, latent, seed, ids)
        elsewhere = lambda: meanwhile.append(functions[0].run(grid=(1,), warmup=False))  # noqa: E731
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()

    def run(function, *args, grid, warmup, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            return "ran"
        ran.append(warmup)
        return before(function, *args, grid=grid, warmup=warmup, **kwargs)

    before = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", run)
    monkeypatch.setattr(triton.compiler, "compile", slow)
    for function in functions:
        function.device_caches.pop(ARCHITECTURE, None)
    monkeypatch.setattr(_ahead.os, "cpu_count", lambda: 2)
    with mock.patch.object(driver, "_active", Device(ARCHITECTURE)), mock.patch.object(_common, "_major", lambda _: 9):
        _ahead.compile_together(launch)
    assert ran == [True, True] and meanwhile == ["ran"] and len(makers) == 2
    assert triton.JITFunction.run is run
    assert all(len(function.device_caches[ARCHITECTURE][0]) == 1 for function in functions)
