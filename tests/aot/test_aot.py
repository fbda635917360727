"""Instructions that each Triton kernel's machine code must and must not hold."""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.fail("ahead-of-time compilation needs a process without TRITON_INTERPRET=1", pytrace=False)

import torch  # noqa: E402
from ahead import ARCHITECTURES, CASES, DTYPES, MODULES, code, launched, name_of, parsed, recorded, run, sass, usage  # noqa: E402
from cuda_rules import cuda_rules  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from purify_fast.ops import REGISTRY  # noqa: E402

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
    # what launchers compute by PyTorch must be possible on CUDA
    with recorded(90, lambda fn, *_, **__: names.add(name_of(fn))), torch.no_grad(), cuda_rules():
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
    "3.6": {
        ("contextual_attention._scaled", 80): 8,
        ("attack_loss._forward", 90): 8,
        ("apgd_step._l2", 100): 8,
    },
    "3.9": {("representation_distance._forward", 90): 8, ("random_transform._backward", 120): 8},
}


#: The most registers of a thread, where more would leave half of a multiprocessor idle.
REGISTERS = {"random_transform._owners": 64}


@every()
def test_compiles_without_spills_or_doubles_and_threads_move_16_bytes(case, dtype):
    for architecture in architectures_of(dtype):
        for kernel in launched(case, dtype, architecture):
            check_resources(kernel, case, architecture)
            check_moves(kernel, case)


def check_resources(kernel, case: str, architecture: int) -> None:
    name, ptx, used = name_of(kernel.src.fn), kernel.asm["ptx"], usage(kernel.asm["cubin"])
    allowed = SPILLS.get(triton.__version__.rpartition(".")[0], {}).get((name, architecture), 0)
    assert used["STACK"] <= allowed and used["LOCAL"] == 0, (name, used, architecture)  # spills
    assert used["REG"] <= REGISTERS.get(name, 255), (name, used, architecture)
    assert not re.search(r"\.f64|\.local\b|__local_depot", ptx), (name, architecture)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("aggregate-") and "peel" in case])
def test_a_difference_from_the_maximum_is_not_fused(case):
    """S - max S must be 0 where S is the largest; fused with the product that S is, it is what rounding left of it."""
    assert [kernel.metadata.enable_fp_fusion for kernel in launched(case, "fp32", 90)] == [False]


@pytest.mark.parametrize("case", CASES)
def test_every_launch_says_whether_products_and_sums_are_fused(case):
    """Triton's default differs between its versions, and decides the last bits of a result."""
    chosen = run(case, "bf16", 90, lambda *_, **options: options.get("enable_fp_fusion"))
    assert chosen and all(type(one) is bool for one in chosen)


#: Where a thread cannot read or write 16 bytes at once: kernel or case, instruction, the bytes that it may, and why.
NARROW = (
    ("contextual_attention.*", "ld", {2, 4, 8}, "the number that moves into a group, and four keys for a thread"),
    ("contextual_attention._spread", "st", {8}, "four keys for a thread"),
    ("contextual_attention._patches", "st", {4}, "the wings of a row, aligned otherwise than the row"),
    ("contextual_attention._gather", "st", {4}, "likewise"),
    ("decode_samples._latents", "st", {8}, "a latent of 128 numbers: four for a thread"),
    ("decode_samples._layer", "ld", {4, 8}, "biases, the condition: four columns for a thread; signs of 32 columns"),
    ("decode_samples._layer", "st", {4}, "the signs of 32 columns"),
    ("decode_samples._last_two", "ld", {2, 4, 8}, "biases, and the last layer's weights, a few thousand numbers"),
    ("decode_samples._last_two", "st", {2, 4}, "an image of three channels, and the signs of 32 columns"),
    ("*._add", "ld", {4}, "a few partial sums"),
    ("diffusion_step-*-channels_last", "ld", {2, 4}, "in the prediction, from one pixel to the next are all channels"),
    ("diffusion_step-*-channels_last", "st", {2, 4}, "likewise"),
    ("aggregate.*", "ld", {8}, "gradients of the classes: two for a thread, which has eight samples of each"),
    ("aggregate.*", "st", {8}, "results for the classes, likewise"),
    ("aggregate-*-few", "ld", {2, 4}, "a class for a thread: rows of ten classes begin anywhere"),
    ("aggregate-*-few", "st", {2, 4}, "likewise"),
    ("attack_loss.*", "ld", {2, 4, 8}, "labels and the logits of their classes, and rows of ten classes"),
    ("attack_loss.*", "st", {4}, "the loss of a row"),
    ("attack_loss-*-few", "st", {2}, "rows of ten classes begin anywhere"),
    ("*pgd_step-linf-channels_last", "ld", {2, 4}, "in the gradient, from one pixel to the next are all channels"),
    ("random_transform._owners", "st", {1}, "32 blocks"),
    ("random_transform.*", "ld", {1}, "the owner of every pixel's block"),
    ("square_proposal.*", "ld", {4}, "the signs of the channels, and the pattern, where its window lies"),
    ("stitch.*", "ld", {1}, "the owner of every pixel's block"),
)


def check_moves(kernel, case: str) -> None:
    """All but single numbers: what a whole program reads or writes once, such as a seed."""
    name, ptx, ir = name_of(kernel.src.fn), kernel.asm["ptx"], kernel.asm["ttgir"]
    for instruction, operation in (("ld", "load"), ("st", "store")):
        moves = re.findall(rf"\b{instruction}\.global\b[\w.:]*?(?:\.v(\d))?\.b(\d+)\s", ptx)
        assert len(moves) == len(re.findall(rf"\b{instruction}\.global\b", ptx)), "an instruction was not read"
        of_case = [rule for rule in NARROW if fnmatch(name, rule[0]) or fnmatch(case, rule[0])]
        allowed = set().union(*(sizes for _pattern, of, sizes, _why in of_case if of == instruction))
        narrow = [size for n, bits in moves if (size := int(n or 1) * int(bits) // 8) < 16 and size not in allowed]
        single = re.findall(rf"tt\.{operation} .* : !tt\.ptr<", ir)
        assert len(narrow) <= len(single), (name, instruction, narrow)


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


@every(lambda case: "-whole-" in case)
def test_a_sample_that_fits_is_read_once(case, dtype):
    """Three images, each in vectors of sixteen bytes; the step and the radius."""
    (tile,) = run(case, dtype, 90, lambda *_, grid, **tile: tile)
    (kernel,) = launched(case, dtype, 90)
    thread = tile["WIDTH"] // (32 * tile["num_warps"]) * DTYPES[dtype].itemsize  # bytes of one image
    assert len(re.findall(r"\bld\.global", kernel.asm["ptx"])) == 3 * thread // 16 + 2


@pytest.mark.parametrize("dtype", COMPILED)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_an_image_that_square_holds_is_read_once_and_written_once(norm, dtype):
    """By the machine code: all accesses of sixteen bytes are outside of loops, and as many as the image has."""
    case = f"square_proposal-{norm}-held"
    one = code(case, dtype)["square_proposal._mass_moved"]
    image = 4 * 32 * 32 * DTYPES[dtype].itemsize // (16 * one.threads)  # vectors of a thread
    for access, images in (("LDG", 2), ("STG", 1)):
        vectors = [at for at, i in enumerate(one.instructions) if re.search(rf"\b{access}\.E\.128", i)]
        assert len(vectors) == images * image
        assert not any(begin <= at < end for at in vectors for begin, end in one.loops)
    assert bool(one.loops) == (norm == "l1")


@pytest.mark.parametrize("dtype", COMPILED)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["", "-few"], ids=["many classes", "few classes"])
def test_a_mean_moves_every_number_once(kind, direction, dtype):
    """A program's threads together read and write as many bytes as its tile has, and so reach the memory's speed."""
    case = f"aggregate-mean-{direction}{kind}"
    (tile,) = run(case, dtype, 90, lambda *_, grid, **tile: tile)
    (kernel,) = launched(case, dtype, 90)
    moved = {
        operation: 32 * tile["num_warps"] * sum(int(count or 1) * int(bits) // 8 for count, bits in found)
        for operation in ("ld", "st")
        for found in [re.findall(rf"\b{operation}\.global\b[\w.:]*?(?:\.v(\d))?\.b(\d+)\s", kernel.asm["ptx"])]
    }
    results, logits = 4 * tile["C"], DTYPES[dtype].itemsize * tile["K"] * tile["C"]
    assert moved == {"ld": logits, "st": results} if direction == "forward" else {"ld": results, "st": logits}
    # a program of ten classes and eight samples would have 80 numbers, and a GPU starts programs too slowly for that
    assert tile["K"] * tile["C"] >= 1024


def sectors(ir: str, operation: str, offset: Callable[[int], int | None]) -> list[tuple[int, int]]:
    """Return the bytes, and the 32-byte sectors, that a warp's instructions of the widest load or store move.

    ``offset`` gives the byte at which an element of the block is in memory; None for an element that is left out. The
    compiler's code says by its layout which elements of the block a thread has, and a thread moves 16 bytes at once.
    """
    moves = re.findall(rf"tt\.{operation} .*tensor<(\d+)x!tt\.ptr<([a-z]+)(\d+)>, (#\w+)>", ir)
    size, _, width, name = max(moves, key=lambda move: int(move[0]))
    layout = re.search(rf"{name} = #ttg\.blocked<{{sizePerThread = \[(\d+)\], threadsPerWarp = \[32\]", ir)
    own, width, counts = int(layout[1]), int(width) // 8, []
    for first in range(0, int(size), 32 * own):
        for part in range(0, own, 16 // width):
            lanes = [first + lane * own + part + i for lane in range(32) for i in range(16 // width)]
            found = [at for each in lanes if (at := offset(each)) is not None]
            if found:
                counts.append((len(found) * width, len({at // 32 for at in found})))
    return counts


@pytest.mark.parametrize("dtype", COMPILED)
@pytest.mark.parametrize("way", ["forward-masked", "forward-passes", "backward"])
def test_packed_images_in_channels_last_move_whole_sectors(way, dtype):
    """A warp reads and writes every byte of each 32-byte sector that it touches: rows of five planes, end to end."""
    case, planes, pixels = f"random_transform-{way}-channels_last", 5, 16 // DTYPES[dtype].itemsize
    # The lengths of a line of the block and of a row of the image, in numbers.
    line, row = 8 * pixels, planes * pixels
    *_, kernel = launched(case, dtype, 90)

    def offset(element: int) -> int | None:
        number = element % line
        return (element // line * row + number) * DTYPES[dtype].itemsize if number < row else None

    counts = sectors(kernel.asm["ttgir"], "load" if way == "backward" else "store", offset)
    threads = 32 * kernel.metadata.num_warps
    assert sum(moved for moved, _ in counts) == threads * row * DTYPES[dtype].itemsize
    assert all(moved == 32 * touched for moved, touched in counts), counts
    # A thread takes part in five of eight accesses of 16 bytes, as a warp has the numbers of four threads in each. The
    # gradient's kernel reads the pixels of three channels, too.
    access = re.findall(r"\b(ld|st)\.global\b[\w.:]*?\.v4\.b32\s", kernel.asm["ptx"])
    assert access.count("ld" if way == "backward" else "st") == 8 + (3 * pixels // 4 if way == "backward" else 0)


#: Bit-exact against the reference, so that no product may be fused with a sum.
EXACT = (
    "*pgd_step-linf*",
    "square_proposal-linf",
    "random_transform-*",
    "noisy_replay",
    "diffusion_step-*",
)
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
#: These have budgets by the layer and by the loop.
BUDGETS_OF_LAYERS = ("decode_samples",)


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
    counted = {case.partition("-")[0] for case, _ in BUDGETS}.union(BUDGETS_OF_LAYERS)
    assert op in counted, f"BUDGETS has no case of {op}: docs/extend.md, An op, step 7"


#: Budgets whose test is not slow: machine code takes long to read. `make cuda-check` looks at all of them.
QUICK = [(case, "bf16") for case in ("aggregate-mean-forward", "gated_elu-forward", "noisy_replay", "pgd_step-linf")]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(*budget, marks=[pytest.mark.slow] * (budget not in QUICK)) for budget in BUDGETS],
    ids=str,
)
def test_instructions(case, dtype):
    assert (got := instructions(case, dtype)) <= BUDGETS[case, dtype], got


#: The kernels of which one program fills a multiprocessor of sm_90: they keep a whole sample in registers.
ALONE = ("pgd_step-l2-whole-16384", "pgd_step-l1-whole-8192")
#: Likewise: eight warps with 174 registers for a thread, and with 221; the matrix units have two programs' work.
FULL = ("decode_samples._layer", "decode_samples._last_two")
#: Where a thread moves two bytes at once, and why.
TWO_BYTES = (
    ("contextual_attention-backward", "LDG", "of numbers of 16 bits the one that moves into a group"),
    ("diffusion_step-*-channels_last", "LDG", "in the prediction, from one pixel to the next are all channels"),
    ("diffusion_step-backward-*-channels_last", "STG", "likewise"),
    ("*pgd_step-linf-channels_last", "LDG", "in the gradient, from one pixel to the next are all channels"),
    ("aggregate-*-few", "LDG", "a class for a thread: rows of ten classes begin anywhere"),
    ("aggregate-*-backward-few", "STG", "likewise"),
    ("attack_loss-*", "LDG", "the logit of the true class"),
    ("attack_loss-*-few", "STG", "rows of ten classes begin anywhere"),
    ("decode_samples-*-forward*", "LDG", "the last layer's weights, a few thousand numbers"),
    ("decode_samples-*-forward*", "STG", "an image of three channels"),
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"] if ALL else ["bf16"])
@pytest.mark.parametrize("case", CASES)
def test_machine_code(case, dtype):
    """No division of 64 bits, which is a call; no access of two bytes; two programs on a multiprocessor."""
    for name, one in code(case, dtype).items():
        calls = [i for i in one.instructions if re.search(r"\bCALL\b.*(div|rem)_[su]64", i)]
        assert not calls, (name, calls)
        narrow = {i.split(".")[0].split()[-1] for i in one.instructions if re.search(r"\b(LDG|STG)\.E\.[US]16", i)}
        allowed = {of for pattern, of, _why in TWO_BYTES if fnmatch(case, pattern)}
        assert narrow <= allowed, (name, narrow)
        assert one.programs() > 1 or case in ALONE or name in FULL, (name, one.registers, one.threads)


#: Most instructions of a warp of sm_90 for the matrix products of one trip of a layer's loop, by the columns of its
#: tile: of 128, 64 and 32. Its share of the matrix units takes 256 cycles for them, 256 and 128.
LOOPS = {128: 135, 64: 195, 32: 195}
#: The newest instruction for matrix products of each architecture.
PRODUCTS = {80: "HMMA.16816", 90: "HGMMA.64x", 100: "UTCHMMA", 120: "HMMA.16816"}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("decode_samples")])
@pytest.mark.parametrize("architecture", architectures_of("bf16"))
def test_the_decoder_multiplies_by_the_matrix_units(case, architecture):
    """On sm_90 by groups of warps, on sm_100 by the fifth generation's; in shared memory that sm_120 has, too."""
    wanted = PRODUCTS[architecture]
    for kernel in launched(case, "bf16", architecture):
        assert kernel.metadata.shared <= 99 * 1024
        if name_of(kernel.src.fn) == "decode_samples._latents":
            continue
        found, loops = parsed(sass(kernel.asm["cubin"]))
        assert any(wanted in one for one in found)
        tile = {kernel.src.fn.arg_names[at]: value for (at,), value in kernel.src.constants.items()}["TILE"]
        for begin, end in loops if architecture == 90 else ():
            if any("HGMMA" in one for one in found[begin:end]):
                assert end - begin <= LOOPS[tile], (tile, end - begin)


#: By columns of the input and of the tile: instructions of a warp in one trip of the loop, and in all the rest.
DECODER = {(128, 128): (93, 1255), (256, 128): (121, 1404), (128, 64): (177, 1295)}
#: The last two layers in one launch: all instructions of a warp, whose loop is unrolled.
LAST_TWO_LAYERS = 3931


@pytest.mark.slow
def test_the_decoders_machine_code_gets_no_longer():
    """Its instructions are as many as they were, by the Triton that they were counted with."""
    within = 0.03 if triton.__version__.startswith("3.8.") else 0.2
    compared = set()
    for kernel in launched("decode_samples-cifar10-forward", "bf16", 90):
        found, loops = parsed(sass(kernel.asm["cubin"]))
        constants = {kernel.src.fn.arg_names[at]: value for (at,), value in kernel.src.constants.items()}
        if name_of(kernel.src.fn) == "decode_samples._last_two":
            assert len(found) == pytest.approx(LAST_TWO_LAYERS, rel=within)
        if name_of(kernel.src.fn) == "decode_samples._layer":
            sizes = constants["CHANNELS"], constants["TILE"]
            loop, rest = DECODER[sizes]
            (trip,) = (end - begin for begin, end in loops if any("HGMMA" in one for one in found[begin:end]))
            assert trip == pytest.approx(loop, rel=within) and len(found) - trip == pytest.approx(rest, rel=within)
            compared.add(sizes)
    assert compared == set(DECODER)


#: Of CARSO's decoder for 32 x 32: the matrix products of the forward pass and of the gradient, in programs, by layer.
PROGRAMS = {
    ("forward", 64): [72, 144, 200, 164, 169],
    ("backward", 64): [545, 145, 162, 200, 72],
    ("forward", 1024): [144, 576, 800, 2592, 1244],
    ("backward", 1024): [8712, 2312, 648, 400, 144],
}


@pytest.mark.parametrize(("part", "samples"), PROGRAMS)
def test_few_samples_fill_the_device_and_the_gradient_computes_no_map(part, samples):
    """With maps computed again, a backward had 11 launches; 64 samples had 18 to 78 programs in four of six."""
    case = f"decode_samples-cifar10-{part}{'-few' if samples == 64 else ''}"
    told = lambda function, *_, grid, **options: (name_of(function), math.prod(grid), options.get("KIND"))  # noqa: E731
    found = run(case, "bf16", 90, told)
    drawn = [found.pop(0)] if part == "forward" else []
    assert [name for name, *_ in drawn] == ["decode_samples._latents"] * len(drawn)
    assert [programs for _, programs, _ in found] == PROGRAMS[part, samples]
    assert part == "forward" or [kind for *_, kind in found] == [3] * 5


def test_the_decoder_in_float32_spills_nothing():
    for case in ("decode_samples-cifar10-forward", "decode_samples-cifar10-backward"):
        for kernel in launched(case, "fp32", 90):
            used = usage(kernel.asm["cubin"])
            assert used["STACK"] == used["LOCAL"] == 0 and used["REG"] <= 128
