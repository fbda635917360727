"""Measure the cost of a network's robust accuracy: by our protocols, by AutoAttack as it is, and as an expert runs it.

The expert freezes the weights, uses channels_last, and lets AutoAttack attack a copy in bfloat16 where this processor
is faster in it. The network itself judges the images that an attack returns.

AutoAttack attacks the images in parts of 50, since the cost of an image does not depend on other images. Its cost for
the first 200 images is the sum of four parts. Our protocols spend effort by evidence from all images, so they run once
for each number of images.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from purify_fast._files import write_text
from purify_fast._tensors import weights_fingerprint
from purify_fast.attacks.engine.judge import has_fallen
from purify_fast.evaluation.show.text import markdown_table
from purify_fast.speed.processor import fast_bfloat16

from .. import kept, options
from ..kept import Row
from ..speed import timing
from .contests import (
    FAST,
    OFFICIAL,
    OURS,
    PARTS,
    ROBUST,
    Amount,
    Contestant,
    Protocol,
    Subject,
    found_by_autoattack,
    misclassified,
    official,
)
from .counted_model import CountedModel

FILE, TABLE = "answer.json", "answer.md"
EXPERT = "AutoAttack, expert"
#: The contests whose networks are attacked, and the numbers of images.
NETWORKS = ("cifar10-pgd-at-w16, 1 to 700", "mnist-pgd-at, 1 to 250")
COUNTS = (50, 200, 700)
PART = PARTS[OFFICIAL]


class Cast(nn.Module):
    """Computes a frozen copy of a network in another dtype, with float32 images and logits."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype, memory_format=torch.channels_last)).float()


def expert(subject: Subject, amount: Amount) -> Tensor:
    """Run the official AutoAttack on an expert's copy of the network; the network itself judges."""
    dtype = torch.bfloat16 if fast_bfloat16(subject.x.device) else torch.float32
    return misclassified(subject, found_by_autoattack(replace(subject, model=Cast(subject.model, dtype)), amount))


CONTESTANTS: dict[str, Contestant] = {
    OURS: Protocol(OURS),
    FAST: Protocol(FAST),
    EXPERT: expert,
    OFFICIAL: official("standard"),
}


def runs(images: int) -> list[tuple[str, int, int]]:
    """Return the runs of a network, the cheap ones first: the contestant, and the first and the last image."""
    own = [(who, 0, min(count, images)) for count in COUNTS for who in (OURS, FAST)]
    parts = [(who, first, min(first + PART, images)) for first in range(0, images, PART) for who in (EXPERT, OFFICIAL)]
    return [*dict.fromkeys(own), *parts]


def measured(subject: Subject, who: str, amount: Amount) -> Row:
    """Run a contestant, and return its processor seconds, its passes, and the images that it leaves."""
    door, begin = CountedModel(subject.model), time.process_time()
    torch.manual_seed(0)
    wrong = CONTESTANTS[who](replace(subject, model=door), amount)
    spent = time.process_time() - begin
    left = int((~has_fallen(wrong)).sum())
    return {"cpu_seconds": spent, "forwards": door.counts.forwards, "gradients": door.counts.gradients, "left": left}


def markdown(rows: Sequence[Row]) -> list[str]:
    """Return the table: a line for each network, number of images and contestant that is complete."""
    head = ["network", "images", "attack", "left", "forward passes per image", "gradients per image"]
    body = []
    for name in NETWORKS:
        own = [row for row in rows if row["network"] == name]
        for count in sorted({row["last"] for row in own if row["contestant"] == OURS}):
            sums = sums_of(own, count)
            by_expert = sums[EXPERT]
            for who, row in sums.items():
                if row is None:
                    continue
                cost = [f"{row['cpu_seconds']:.0f}"]
                cost.append("" if by_expert is None else f"{row['cpu_seconds'] / by_expert['cpu_seconds']:.2f}")
                title = f"**{who}**" if who in (OURS, FAST) else who
                passes = [f"{row[key] / count:,.0f}" for key in ("forwards", "gradients")]
                body.append([name.partition(",")[0], str(count), title, str(row["left"]), *passes, *cost])
    table = markdown_table([*head, "CPU seconds", "share of the expert's"], body)
    return [f"Measured on: {kept.machines(rows)}.", "", *table] if rows else []


def sums_of(rows: Sequence[Row], count: int) -> dict[str, Row | None]:
    """Return the sums of each contestant for the first images of a network; None if some parts are missing."""
    return {who: _sum([row for row in rows if row["contestant"] == who], count) for who in CONTESTANTS}


def _sum(rows: Sequence[Row], count: int) -> Row | None:
    """Sum up the parts of the first ``count`` images, or take the run that has just these; None if some are missing."""
    whole = [row for row in rows if (row["first"], row["last"]) == (0, count)]
    parts = whole or [row for row in rows if row["last"] <= count]
    if sum(row["last"] - row["first"] for row in parts) != count:
        return None
    return {key: sum(row[key] for row in parts) for key in ("cpu_seconds", "forwards", "gradients", "left")}


def read(out: Path) -> list[Row]:
    """Return the rows in a folder of results, or an empty list if there is no results file."""
    return kept.rows_of(out / FILE)


def _code(who: str, amount: Amount) -> list[str]:
    attack = CONTESTANTS[who]
    return attack.code(False, amount) if isinstance(attack, Protocol) else []


def outdated(results: Path) -> list[str]:
    """Return a message for each row that was made with other attacks than the package has now."""
    return [
        kept.outdated(FILE, f"{row['contestant']} on {row['network']!r}", "answer")
        for row in read(results / "studies")
        if row["code"] != _code(row["contestant"], Amount())
    ]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks answer``."""
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=NETWORKS, help="networks; default: all")
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz and mnist.npz, or with the official files")
    parser.add_argument("--images", type=int, default=COUNTS[-1], help="largest number of images; default: %(default)s")
    options.add_out(parser, "/studies")


def main(chosen: argparse.Namespace) -> str:
    """Make the runs that are missing, the cheap ones first, and return the table."""
    out = options.out_of(chosen, chosen.quick, "studies")
    amount = Amount(steps=2, queries=5) if chosen.quick else Amount()
    for name in chosen.network:
        subject = ROBUST[name].make(chosen.data)
        for who, first, last in runs(min(len(subject.x), 4 if chosen.quick else chosen.images)):
            part = replace(subject, x=subject.x[first:last], y=subject.y[first:last])
            row: Row = {"network": name, "contestant": who, "first": first, "last": last, "code": _code(who, amount)}
            row["weights"] = weights_fingerprint(subject.model)
            known = {_place(one): one for one in read(out)}.get(_place(row), {})
            if all(known.get(each) == row[each] for each in row):
                continue
            row |= measured(part, who, amount) | timing.environment(torch.device("cpu"))
            kept.put(out / FILE, row, _place)
            print(f"{name}, {first} to {last}: {who} leaves {row['left']}, {row['cpu_seconds']:.1f} s", flush=True)
            write_text(out / TABLE, "\n".join(markdown(read(out))) + "\n")
    return (out / TABLE).read_text()


def _place(row: Row) -> tuple[int, int, int, int]:
    """Return the place of a row in the results file."""
    return NETWORKS.index(row["network"]), list(CONTESTANTS).index(row["contestant"]), row["first"], row["last"]
