"""Time the parts of docs/import.md against the lines of PyTorch that they replace.

Both are called from Python, in one thread, and take turns. The time is the processor's. Random parts are compared with
lines that draw by `torch.randn` or `torch.rand`, so their results differ.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from purify_fast import nn, ops

from .. import RESULTS, kept
from . import sheets, timing

FILE = "cpu/replaced.json"
#: The turns of each contestant, and the seconds of a turn.
TURNS, SECONDS = 9, 0.02
EPS, ALPHA = 8 / 255, 2 / 255


class Part(NamedTuple):
    """A part of the package, and the lines that it replaces."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    #: For each size, the shapes of the arguments.
    shapes: list[tuple[tuple[int, ...], ...]]
    #: True if the first argument gets a gradient.
    learns: bool = True
    #: Makes the arguments of a size. By default each is drawn from the normal distribution.
    makes: Callable[..., tuple[Tensor, ...]] | None = None


def _latent(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    std = (0.5 * logvar).exp()
    return mu + std * torch.randn_like(std), -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(-1)


def _bce(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).sum(1)


def _gated(features: Tensor) -> Tensor:
    left, right = features.chunk(2, 1)
    return F.elu(left) * right.sigmoid()


def _masked(x: Tensor) -> tuple[Tensor, Tensor]:
    noisy = 2 * (x + 0.25 * torch.randn_like(x)).clamp(0, 1) - 1
    rows, columns = x.shape[2] // 4, x.shape[3] // 4
    hidden = torch.rand(len(x), rows * columns).argsort(1).argsort(1) < rows * columns // 4
    mask = hidden.view(-1, 1, rows, columns).repeat_interleave(4, 2).repeat_interleave(4, 3).to(x.dtype)
    return torch.cat([noisy * (1 - mask), torch.ones_like(mask), mask], 1), mask


def _pgd_step(x: Tensor, gradient: Tensor, clean: Tensor) -> Tensor:
    x = x + ALPHA * gradient.sign()
    return torch.min(torch.max(x, clean - EPS), clean + EPS).clamp(0, 1)


IMAGES = [(32, 3, 32, 32), (256, 3, 32, 32)]
PARTS = {
    "nn.CosineDistance": Part(
        nn.CosineDistance(),
        lambda a, b: 1 - F.cosine_similarity(a.flatten(1), b.flatten(1)),
        [(shape, shape) for shape in ((2, 512), (32, 3, 32, 32), (128, 640, 8, 8))],
    ),
    "nn.SampleLatent": Part(nn.SampleLatent(), _latent, [(shape, shape) for shape in ((32, 128), (256, 512))]),
    "nn.ReconstructionLoss": Part(
        nn.ReconstructionLoss(),
        _bce,
        [(shape, shape) for shape in IMAGES],
        makes=lambda a, b: (torch.randn(a), torch.rand(b)),
    ),
    "nn.Aggregate, lse": Part(nn.Aggregate(), lambda x: x.logsumexp(1), [((32, 8, 10),), ((256, 8, 100),)]),
    "nn.Aggregate, mean": Part(nn.Aggregate("mean"), lambda x: x.mean(1), [((32, 8, 10),), ((256, 8, 100),)]),
    "nn.GatedELU": Part(nn.GatedELU(), _gated, [((32, 64, 32, 32),), ((8, 192, 16, 16),)]),
    "nn.RandomMask": Part(nn.RandomMask(4, 0.25, 0.25), _masked, [(shape,) for shape in IMAGES]),
    "ops.pgd_step": Part(
        lambda x, gradient, clean: ops.pgd_step(x, gradient, clean, ALPHA, EPS),
        _pgd_step,
        [(shape,) * 3 for shape in IMAGES],
        learns=False,
        makes=lambda *shapes: (torch.rand(shapes[0]), torch.randn(shapes[1]), torch.rand(shapes[2])),
    ),
}


def call(function: Callable[..., Any], learns: bool, first: Tensor, *rest: Tensor) -> None:
    """Call a contestant, with the gradient of the first argument if ``learns``."""
    if not learns:
        with torch.no_grad():
            function(first, *rest)
        return
    result = function(first.requires_grad_(), *rest)
    outputs = [one for one in (result if isinstance(result, tuple) else (result,)) if one.requires_grad]
    torch.autograd.grad(outputs, first, [torch.ones_like(one) for one in outputs])


def milliseconds(contestants: list[Callable[[], None]]) -> list[float]:
    """Return the median milliseconds of a call of each contestant. They take turns."""
    counts, taken = [], [list[float]() for _ in contestants]
    for run in contestants:
        run()
        begin, count = time.process_time(), 0
        while time.process_time() - begin < SECONDS:
            run()
            count += 1
        counts.append(count)
    for _ in range(TURNS):
        for run, count, times in zip(contestants, counts, taken, strict=True):
            begin = time.process_time()
            for _ in range(count):
                run()
            times.append(1e3 * (time.process_time() - begin) / count)
    return [statistics.median(times) for times in taken]


def main(chosen: argparse.Namespace) -> Path:
    """Run ``python -m benchmarks replaced``, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, part in tqdm(PARTS.items(), unit=" parts"):
            for shapes in part.shapes:
                row: kept.Row = {"part": name, "shape": list(shapes[0])} | timing.environment(torch.device("cpu"))
                given = part.makes(*shapes) if part.makes else tuple(map(torch.randn, shapes))
                for learns in (False, True)[: 1 + part.learns]:
                    # Each size is compiled for itself. Dynamo would give up after eight sizes of the same lines.
                    torch.compiler.reset()
                    fused = torch.compile(part.theirs, dynamic=False)
                    runs = [functools.partial(call, one, learns, *given) for one in (part.theirs, fused, part.ours)]
                    row["gradient" if learns else "forward"] = milliseconds(runs)
                kept.put(RESULTS / FILE, row, key=lambda row: (list(PARTS).index(row["part"]), row["shape"]))
    finally:
        torch.set_num_threads(threads)
    return RESULTS / FILE


def table(results: Path) -> list[str]:
    """Return the table of docs/import.md: how many times as fast as the replaced lines each part is."""
    rows = kept.existing(results / FILE)
    body = []
    for row in rows:
        line = [row["part"], json.dumps(row["shape"])]
        for measured in (row["forward"], row.get("gradient")):
            line += ["-", "-"] if measured is None else [f"{other / measured[-1]:.2f}" for other in measured[:2]]
        body.append(line)
    head = ["part", "first argument", "forward", "forward, compiled", "with gradient", "with gradient, compiled"]
    return [f"Measured on: {kept.machines(rows)}.", "", *sheets.table(head, body)]
