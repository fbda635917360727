"""Time each kernel and its reference as ``purify-fast tune`` does, on a GPU also in replays of a CUDA graph.

The smallest sizes that are declared beside the ops follow from the written times of eager calls.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from purify_fast.ops.dispatch import tuning
from purify_fast.speed import retain_freed_memory
from purify_fast.speed.graphs.graphed_loop import CudaCapture

from .. import options
from . import sheets
from .running import device_class
from .timing import environment

ROWS = "kernels.csv"
#: The styles of calls that are timed, and their names in pages.
STYLES = {"eager": "eager calls", "replay": "replays of a CUDA graph"}
DTYPES = (torch.float32, torch.bfloat16)


def speedups(rows: list[dict]) -> tuning.Speedups:
    """Return the speedups of eager calls from the rows of kernels.csv, over all layouts and dtypes together."""
    sums: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        if row["style"] == "eager":
            both = sums.setdefault((row["op"], row["variant"]), {}).setdefault(int(row["elements"]), [0.0, 0.0])
            both[:] = both[0] + float(row["reference_us"]), both[1] + float(row["kernel_us"])
    return {at: {size: both[0] / both[1] for size, both in own.items()} for at, own in sums.items()}


def measure(device: torch.device, out: Path) -> tuple[list[dict], dict[str, str]]:
    """Time all kernels on a device, and write kernels.csv. Return its rows, and what was not timed, with the reason."""
    retain_freed_memory()
    forms: dict[str, Callable] = {"eager": lambda call: call}
    if device.type == "cuda":
        device, capture = torch.device("cuda", torch.cuda.current_device()), CudaCapture()

        def replay(call: tuning.Call) -> tuning.Call:
            with capture.aside(device):
                call()
            return capture.record(call, device)

        forms["replay"] = replay
    rows: list[dict] = []
    problems: dict[str, str] = {}
    for style, dtype in itertools.product(forms, DTYPES):
        times, failed = tuning.time_kernels(tuning.with_kernel(device), device, dtype, forms[style])
        names = {"dtype": str(dtype).removeprefix("torch."), "style": style}
        for (op, variant, size), (reference, kernel) in times.items():
            row = {"op": op, "variant": variant, "elements": size, **names}
            row |= {"reference_us": f"{1e6 * reference:.3f}", "kernel_us": f"{1e6 * kernel:.3f}"}
            rows.append(row | environment(device))
        problems |= failed
    sheets.write_csv(out / ROWS, rows)
    return rows, problems


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks kernels``."""
    options.add_device(parser)
    options.add_out(parser, "/<device>", quick=False)


def main(chosen: argparse.Namespace) -> Path:
    """Run ``python -m benchmarks kernels``. Return the path of the times."""
    out = options.out_of(chosen, False, device_class(chosen.device))
    _, problems = measure(chosen.device, out)
    for name, why in problems.items():
        print(f"not timed: {name}: {why}")
    return out / ROWS
