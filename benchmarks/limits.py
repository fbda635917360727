"""What the device can do at most, measured: bytes copied and bfloat16 products per second."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from . import measure, report

FILE = "limits.csv"
COPY, PRODUCT = "copy", "bfloat16 product"


@dataclass(frozen=True)
class Size:
    bytes: int  # of one buffer
    matrix: int  # rows and columns
    runs: int


SIZES = {"cuda": Size(2 << 30, 8192, 20), "cpu": Size(256 << 20, 2048, 10)}
QUICK = Size(8 << 20, 256, 3)


def _times(calls: list[Callable[[], object]], device: torch.device, runs: int) -> list[float]:
    """Of ``runs`` calls in turn, after each was made once."""
    for call in calls:
        call()
    return [measure.seconds([call], device) for call, _ in zip(cycle(calls), range(runs), strict=False)]


def copies(device: torch.device, size: Size) -> tuple[int, list[float]]:
    """Bytes read and written by a copy, and times; buffers take turns, so that no cache holds what is read next."""
    length = size.bytes
    if device.type == "cuda":
        length = min(length, torch.cuda.mem_get_info(device)[0] // 8)
    pairs = [[torch.empty(length // 4, dtype=torch.int32, device=device).random_() for _ in range(2)] for _ in range(2)]
    calls: list[Callable[[], object]] = [lambda source=a, target=b: target.copy_(source) for a, b in pairs]
    return 2 * pairs[0][0].nbytes, _times(calls, device, size.runs)


def operands(device: torch.device, *shape: int) -> Tensor:
    """Random numbers: a GPU multiplies ones or zeros faster than it does data."""
    return torch.randn(shape, device=device).to(torch.bfloat16)


def products(device: torch.device, size: Size) -> tuple[int, list[float]]:
    """FLOP of a square product, and times."""
    a, b = (operands(device, size.matrix, size.matrix) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size.matrix**3, _times([lambda: torch.mm(a, b, out=out)], device, size.runs)


@torch.no_grad()
def run(device: torch.device, quick: bool, out: Path) -> list[dict]:
    """Measure, and write ``out``'s limits.csv."""
    size = QUICK if quick else SIZES[device.type]
    rows = []
    for name, unit, measured in ((COPY, "GB/s", copies), (PRODUCT, "GFLOP/s", products)):
        work, times = measured(device, size)
        median, fast, slow = statistics.median(times), measure.quantile(times, 1), measure.quantile(times, 4)
        rates = {"median": work / median / 1e9, "p20": work / slow / 1e9, "p80": work / fast / 1e9}
        what = f"{size.matrix}x{size.matrix}x{size.matrix}" if name == PRODUCT else f"{work // 2} bytes"
        row = {"limit": name, "unit": unit, **{key: f"{rate:.1f}" for key, rate in rates.items()}, "size": what}
        rows.append(row | {"runs": size.runs} | measure.environment(device))
    report.write_csv(out / FILE, rows)
    return rows


def read(folder: Path) -> dict[tuple[str, str], float]:
    """Rates by device and limit, in units per second; empty where none were measured."""
    rows = report.rows_of(folder / FILE)
    return {(row["device"], row["limit"]): 1e9 * float(row["median"]) for row in rows}
