"""Measure the cost of a network's robust accuracy: by our protocols, by AutoAttack as it is, and as an expert runs it.

The expert freezes the weights, uses channels_last, and lets AutoAttack attack a copy in bfloat16 where this processor
is faster in it. The network itself judges the images that an attack returns.

AutoAttack attacks the images in parts of 50, since the cost of an image does not depend on other images. Its cost for
the first 200 images is the sum of four parts. Our protocols spend effort by evidence from all images, so they run once
for each number of images.

Random defences are attacked by ``fast``, as a user calls it, and by AutoAttack's version "rand", as it is and with
frozen weights. Fresh draws judge the images of both.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples import random_defence
from purify_fast import zoo
from purify_fast._settings import weights_fingerprint
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation import evaluate
from purify_fast.judge.searches.engine import has_fallen
from purify_fast.judge.show.text import markdown_table
from purify_fast.speed.precision import fast_bfloat16

from .. import kept, options
from ..kept import Row
from ..speed import timing
from . import revisions
from .contests import (
    CONTESTS,
    FAST,
    OFFICIAL,
    OURS,
    PARTS,
    Amount,
    Contestant,
    Protocol,
    Subject,
    found_by_autoattack,
    misclassified,
    official,
)
from .counted_model import CountedModel

FILE = "answer.json"
EXPERT, RAND = "AutoAttack, expert", "AutoAttack rand"
#: The contests whose networks are attacked, and the numbers of images.
NETWORKS = ("cifar10-pgd-at-w16, 1 to 700", "mnist-pgd-at, 1 to 250")
COUNTS = (50, 200, 700)
PART = PARTS[OFFICIAL]
#: Increase this number if a change of the package changes the cost of ``fast`` on random defences.
ANSWER = 2


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


class Smoothed(nn.Module):
    """Adds Gaussian noise to the images before a network, as randomized smoothing does in each of its draws."""

    def __init__(self, network: nn.Module, sigma: float):
        super().__init__()
        self.network, self.sigma = network, sigma

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + self.sigma * torch.randn_like(x))


def _on_images_of(name: str, make: Callable[[], nn.Module], folder: Path | None) -> Subject:
    """Make a defence, with the test images and the radius of a model of the zoo."""
    card = zoo.card(name)
    images = load_dataset(card.data, folder)
    return Subject(make().eval(), to_float(images.x_test), images.y_test, card.eps)


FROZEN_RAND = f"{RAND}, frozen"
EIGHT = dict.fromkeys((FAST, FROZEN_RAND, RAND), (8,))
BASE = "cifar10-pgd-at-w16"
ZOO = "digits-carso-pipeline", "digits-atop-pipeline", "mnist-carso-objective"
#: By name of a random defence: the function that makes it, and the numbers of images for each contestant.
RANDOM: dict[str, tuple[Callable[[Path | None], Subject], dict[str, tuple[int, ...]]]] = {
    "random transforms (examples/random_defence.py)": (
        partial(_on_images_of, BASE, random_defence.make),
        {FAST: (4, 64), FROZEN_RAND: (4,), RAND: (4,)},
    ),
    f"{BASE} with Gaussian noise 0.1": (partial(_on_images_of, BASE, lambda: Smoothed(zoo.load(BASE), 0.1)), EIGHT),
    **{name: (partial(_on_images_of, name, partial(zoo.load, name)), EIGHT) for name in ZOO},
}


def measured_random(subject: Subject, who: str, amount: Amount) -> Row:
    """Attack a random defence; all numbers are measured in one run of the process."""
    torch.manual_seed(0)
    begin = time.process_time()
    if who == FAST:
        settings: dict[str, Any] = {"protocol": FAST, "steps": amount.steps, "progress": False}
        report = evaluate(subject.model, subject.x, subject.y, eps=subject.eps, **settings)
        spent = time.process_time() - begin
        forwards, gradients = re.findall(r"([\d,]+) (?:forward|gradients)", report.about["passes"])
        left = {"left": int(report.headline.robust.sum()), "one_draw": report.headline.mean}
        counts = {"forwards": forwards, "gradients": gradients}
        passes = {name: int(text.replace(",", "")) * len(subject.x) for name, text in counts.items()}
        return {"cpu_seconds": spent} | passes | left
    model = copy.deepcopy(subject.model).requires_grad_(False) if who == FROZEN_RAND else subject.model
    door = CountedModel(model)
    found = found_by_autoattack(replace(subject, model=door), amount, "rand")
    spent = time.process_time() - begin
    # The rule of the report: an image is left if five fresh draws are right.
    judged = evaluate(subject.model, found, subject.y, eps=0, attacks=[], progress=False).row("clean")
    left = {"left": int(judged.robust.sum()), "one_draw": judged.mean}
    return {"cpu_seconds": spent, "forwards": door.counts.forwards, "gradients": door.counts.gradients} | left


def costs(row: Row, images: int, base: Row | None) -> list[str]:
    """Return the cells of the passes per image, the CPU seconds, and their share of the CPU seconds of another row."""
    passes = [f"{row[key] / images:,.0f}" for key in ("forwards", "gradients")]
    share = "" if base is None else f"{row['cpu_seconds'] / base['cpu_seconds']:.2f}"
    return [*passes, f"{row['cpu_seconds']:.0f}", share]


def in_bold(who: str) -> str:
    """Return the name of a contestant for a table. Protocols of this package are in bold letters."""
    return f"**{who}**" if who in (OURS, FAST) else who


def markdown_random(rows: Sequence[Row]) -> list[str]:
    """Return the table of the random defences: a line for each number of images and contestant."""
    head = ["defence", "images", "attack", "left", "right in one draw, %", "forward passes per image"]
    by_frozen = {(row["network"], row["last"]): row for row in rows if row["contestant"] == FROZEN_RAND}
    body = []
    for row in rows:
        n = row["last"]
        cells = [row["network"], str(n), in_bold(row["contestant"]), str(row["left"]), f"{100 * row['one_draw']:.0f}"]
        body.append([*cells, *costs(row, n, by_frozen.get((row["network"], n)))])
    head += ["gradients per image", "CPU seconds", "share of frozen rand's"]
    where = f"Random defences, measured on: {kept.machines(rows)}."
    return ["", where, "", *markdown_table(head, body)] if rows else []


CONTESTANTS: dict[str, Contestant] = {
    OURS: Protocol(OURS),
    FAST: Protocol(FAST),
    EXPERT: expert,
    OFFICIAL: official,
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
            for who, row in sums.items():
                if row is not None:
                    cells = [name.partition(",")[0], str(count), in_bold(who), str(row["left"])]
                    body.append([*cells, *costs(row, count, sums[EXPERT])])
    table = markdown_table([*head, "CPU seconds", "share of the expert's"], body)
    plain, random = ([row for row in rows if (row["network"] in RANDOM) is wanted] for wanted in (False, True))
    return ([f"Measured on: {kept.machines(plain)}.", "", *table] if plain else []) + markdown_random(random)


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


def _code(who: str, amount: Amount, random: bool = False) -> list[str]:
    if who in (RAND, FROZEN_RAND):
        return []
    if random:
        return revisions.of_protocol(who, random=True) + revisions.of_rule(random=True) + [f"answer {ANSWER}"]
    attack = CONTESTANTS[who]
    return attack.code(amount) if isinstance(attack, Protocol) else []


def outdated(results: Path) -> list[str]:
    """Return a message for each row that was made with other attacks than the package has now."""
    return [
        kept.outdated(FILE, f"{row['contestant']} on {row['network']!r}", "answer")
        for row in read(results / "studies")
        if row["code"] != _code(row["contestant"], Amount(), row["network"] in RANDOM)
    ]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks answer``."""
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz and mnist.npz, or with the official files")
    options.add_out(parser, "/studies")


def main(chosen: argparse.Namespace) -> str:
    """Make the runs that are missing, the cheap ones first, and return the table."""
    out = options.out_of(chosen, chosen.quick, "studies")
    amount = Amount(steps=2, queries=5) if chosen.quick else Amount()
    for name in (*NETWORKS, *RANDOM):
        random = name in RANDOM
        if random:
            make, counts = RANDOM[name]
            subject = make(chosen.data)
            asked = [(who, 0, 2 if chosen.quick else count) for who, each in counts.items() for count in each]
        else:
            subject = CONTESTS[name].make(chosen.data)
            asked = runs(min(len(subject.x), 4 if chosen.quick else COUNTS[-1]))
        for who, first, last in asked:
            part = replace(subject, x=subject.x[first:last], y=subject.y[first:last])
            code = _code(who, amount, random)
            row: Row = {"network": name, "contestant": who, "first": first, "last": last, "code": code}
            row["weights"] = weights_fingerprint(subject.model)
            known = {_place(one): one for one in read(out)}.get(_place(row), {})
            if all(known.get(each) == row[each] for each in row):
                continue
            row |= (measured_random if random else measured)(part, who, amount)
            row |= timing.environment(torch.device("cpu"))
            kept.put(out / FILE, row, _place)
            print(f"{name}, {first} to {last}: {who} leaves {row['left']}, {row['cpu_seconds']:.1f} s", flush=True)
    return "\n".join(markdown(read(out)))


def _place(row: Row) -> tuple[int, int, int, int]:
    """Return the place of a row in the results file."""
    networks, contestants = [*NETWORKS, *RANDOM], [*CONTESTANTS, FROZEN_RAND, RAND]
    place = networks.index(row["network"]), contestants.index(row["contestant"])
    return *place, row["first"], row["last"]
