"""Count the instructions that a thread of a Triton kernel executes on sm_90, and compare two times.

The first time is the time that the instructions take. The second is the time that the memory takes to move the data.

The kernels are compiled ahead of time, and the instructions are counted in the machine code. This needs no GPU, and no
time is measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from .. import RESULTS
from ..speed import sheets
from ..speed.sheets import read_csv, write_csv

#: The rates of an H100 at 1.7 GHz, for each of its 132 multiprocessors and each cycle. BYTES is the memory bandwidth.
#: ISSUED is the number of instructions, where the same instruction in 32 threads counts as 32.
BYTES, ISSUED = 3.35e12 / 132 / 1.7e9, 128
RESULT = "instructions.csv"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        case: name of the case in `benchmarks.gpu.ahead.CASES`.
        dtype: name of the dtype in `benchmarks.gpu.ahead.DTYPES`.
        elements: number of elements that a thread computes with the counted instructions.
        bytes: least number of bytes that must be read and written for these elements.
        where: description of the bytes.
        trips: number of iterations of the kernel's loops.
        divided: number by which the counted instructions are divided. It is above 1 if the loops compute more elements
            than ``elements``, by this factor.
    """

    case: str
    dtype: str
    elements: int
    bytes: int
    where: str
    trips: int = 1
    divided: int = 1


EXECUTED = (
    Row("pgd_step-linf", "bf16", 8, 64, "three images read, one written"),
    Row("apgd_step-linf", "bf16", 8, 80, "four images read, one written"),
    Row("philox-bits", "fp32", 4, 16, "results written"),
    Row("philox-normal", "fp32", 4, 16, "results written"),
    Row("sample_latent-forward", "fp32", 8, 96, "mu and logvar read, z written"),
    Row("sample_latent-backward", "bf16", 8, 80, "three read, two written"),
    Row("random_transform-forward-masked", "bf16", 8, 48, "the float32 image read, the packed one written"),
    Row("noisy_replay", "bf16", 8, 32, "one of two images read, one written"),
    Row("diffusion_step-forward-fixed", "bf16", 8, 80, "state and 16-bit prediction read, next state written"),
    Row("diffusion_step-forward-learned", "bf16", 8, 96, "state and double 16-bit prediction read, next state written"),
    Row("diffusion_step-forward-noiseless", "bf16", 8, 80, "state and 16-bit prediction read, next state written"),
    Row("diffusion_step-backward-fixed", "bf16", 8, 128, "gradient, state and prediction read, two gradients written"),
    Row(
        "diffusion_step-backward-learned",
        "bf16",
        8,
        160,
        "gradient, state, double prediction read, two gradients written",
    ),
    Row("gated_elu-forward", "bf16", 8, 48, "two halves read, one written"),
    Row("gated_elu-backward", "bf16", 8, 80, "three read, two written"),
    Row("stitch-forward", "bf16", 8, 32, "one pass read, one image written"),
    Row("stitch-forward-channels_last", "bf16", 8, 32, "one pass read, one image written"),
    Row("stitch-backward", "bf16", 8, 80, "one image read, four passes written"),
    Row("aggregate-lse-forward", "fp32", 16, 64, "logits read"),
    Row("aggregate-mean_sigmoid-forward", "fp32", 16, 64, "logits read"),
    Row("aggregate-mean_sigmoid-backward", "fp32", 16, 128, "logits read, their gradient written"),
    Row("contextual_attention-forward", "bf16", 4, 64, "G read, A and four U written", trips=4, divided=4),
    Row("contextual_attention-backward", "bf16", 4, 80, "four U, A and G read, one written", trips=4, divided=4),
)
#: The iterations of the loops of kernels for which `Row.trips` is wrong, from the outermost loop inward.
TRIPS = {"contextual_attention._scaled": (8,), "contextual_attention._gather": (4, 2)}
#: Kernels whose instructions are not counted, because they compute on the few blocks of a mask, not on the elements.
APART = ("random_transform._owners",)


def instructions(case: str, dtype: str) -> int:
    """Return the instructions that a thread executes in all launches of a case, for the elements of its `Row`."""
    # Import the module only here, because it needs Triton, and `table` must work without Triton.
    from . import ahead

    row = next((row for row in EXECUTED if row.case == case), Row(case, dtype, 0, 0, ""))
    total = 0.0
    for name, code in ahead.code(case, dtype).items():
        if name in APART:
            continue
        trips = TRIPS.get(name, (row.trips,))
        total += code.executed(*trips) / (trips[0] if row.divided > 1 else 1)
    return round(total)


def write(folder: Path) -> Path:
    """Count the instructions of all rows, and write the results file. Its column ``before`` is not changed."""
    path = folder / RESULT
    known = {(line["case"], line["dtype"]): line for line in read_csv(path)} if path.exists() else {}
    rows = []
    for row in EXECUTED:
        counted = instructions(row.case, row.dtype)
        before = known.get((row.case, row.dtype), {}).get("before", counted)
        rows.append({"case": row.case, "dtype": row.dtype, "before": before, "instructions": counted})
    write_csv(path, rows)
    return path


def main(chosen: argparse.Namespace) -> Path:
    """Run ``python -m benchmarks instructions``."""
    return write(RESULTS)


def table(results: Path) -> list[str]:
    """Return the table of instructions and memory times for docs/performance.md."""
    counted = {(line["case"], line["dtype"]): line for line in read_csv(results / RESULT)}
    body = []
    for row in EXECUTED:
        before, now = (int(counted[row.case, row.dtype][of]) for of in ("before", "instructions"))
        memory = row.bytes / BYTES
        bound = "memory" if now / ISSUED <= memory else f"arithmetic, {now / ISSUED / memory:.1f}x"
        cells = [f"{row.case} {row.dtype}", row.elements, f"{row.bytes} bytes: {row.where}", f"{before:,}", f"{now:,}"]
        body.append([*cells, f"{before / ISSUED:.1f}", f"{now / ISSUED:.1f}", f"{memory:.1f}", bound])
    moved = ["kernel", "elements", "moved", "instructions before", "instructions now"]
    return sheets.table([*moved, "cycles before", "cycles now", "memory cycles", "bound by"], body)
