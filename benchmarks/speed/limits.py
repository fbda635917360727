"""Measure the limits of a device: the bandwidth of a copy, and the rate of bfloat16 matrix products."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from . import sheets, timing

FILE = "limits.csv"
COPY, PRODUCT = "copy", "bfloat16 product"


#: The sizes of the measurements on each type of device: the bytes of the buffer that is copied, the rows of the square
#: matrix that is multiplied, and the number of runs. A quick run uses QUICK on every device.
SIZES = {"cuda": (2 << 30, 8192, 20), "cpu": (256 << 20, 2048, 10)}
QUICK = (8 << 20, 256, 3)


def times_of(calls: list[Callable[[], object]], device: torch.device, runs: int) -> list[float]:
    """Call each function once untimed. Then make ``runs`` calls in turn, and return the seconds of each call."""
    for call in calls:
        call()
    return [timing.seconds([call], device) for call, _ in zip(cycle(calls), range(runs), strict=False)]


def copies(device: torch.device, length: int, runs: int) -> tuple[int, list[float]]:
    """Return the bytes that a copy reads and writes, and its times in seconds.

    Two pairs of buffers take turns, so that no cache contains the next buffer.
    """
    if device.type == "cuda":
        length = min(length, torch.cuda.mem_get_info(device)[0] // 8)
    pairs = [[torch.empty(length // 4, dtype=torch.int32, device=device).random_() for _ in range(2)] for _ in range(2)]
    calls: list[Callable[[], object]] = [lambda source=a, target=b: target.copy_(source) for a, b in pairs]
    return 2 * pairs[0][0].nbytes, times_of(calls, device, runs)


def operands(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a random tensor. It must not be constant, because a GPU multiplies constant values faster."""
    return torch.randn(shape, device=device).to(dtype)


def products(
    device: torch.device, rows: int, runs: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[int, list[float]]:
    """Return the FLOP of a product of two square matrices, and its times in seconds."""
    a, b = (operands(device, rows, rows, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * rows**3, times_of([lambda: torch.mm(a, b, out=out)], device, runs)


@torch.no_grad()
def run(device: torch.device, quick: bool, out: Path) -> list[dict]:
    """Measure both limits, write them to limits.csv in the folder ``out``, and return the rows."""
    length, side, runs = QUICK if quick else SIZES[device.type]
    moved, copying = copies(device, length, runs)
    computed, multiplying = products(device, side, runs)
    rows = []
    for name, unit, work, times, size in (
        (COPY, "GB/s", moved, copying, f"{moved // 2} bytes"),
        (PRODUCT, "GFLOP/s", computed, multiplying, f"{side}x{side}x{side}"),
    ):
        row = {"limit": name, "unit": unit, "median": f"{work / statistics.median(times) / 1e9:.1f}"}
        rows.append(row | {"size": size, "runs": runs} | timing.environment(device))
    sheets.write_csv(out / FILE, rows)
    return rows


def read(folder: Path) -> dict[tuple[str, str], float]:
    """Return the rates by device and limit, in GB/s or GFLOP/s. The result is empty if nothing was measured."""
    rows = sheets.rows_of(folder / FILE)
    return {(row["device"], row["limit"]): float(row["median"]) for row in rows}
