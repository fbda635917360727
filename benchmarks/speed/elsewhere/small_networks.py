"""Measure PGD-10 on small networks, where much of the time is spent between the operators, and not in them.

The contestants are an expert's loop in plain PyTorch, torchattacks, and this package on the model and on a frozen copy.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from purify_fast import frozen_copy
from purify_fast.attacks import pgd

from .. import sheets, timing
from . import ALPHA, EPS
from .loops import STEPS

FILE = "elsewhere_small.csv"
#: The name that selects the table on the command line.
NAME = "small networks"
ATTACKS = "expert", "torchattacks", "model", "copy"
TIMED = *ATTACKS, "call", "call_copy"
CALL = "plain call"
ROWS = ("linear", 1), ("linear", 64), ("CNN", 1), ("CNN", 32), ("CNN", 256), (CALL, 1)
#: The number of rounds, and the seconds for which a contestant is repeated in a round.
ROUNDS, SECONDS = 9, 0.05


def network(name: str) -> nn.Module:
    """Return a network with random weights for images of 1 x 28 x 28."""
    torch.manual_seed(0)
    features = nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten()
    if name == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    last = () if name == CALL else (nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10))
    return nn.Sequential(*features, *last).eval()


def pgd_by_expert(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Attack by PGD with a constant step, as an expert writes it in plain PyTorch."""
    low, high = (x - EPS).clamp_(0, 1), (x + EPS).clamp_(0, 1)
    near = torch.empty_like(x).uniform_(-EPS, EPS).add_(x).clamp_(0, 1)
    for _ in range(STEPS):
        near.requires_grad_()
        loss = F.cross_entropy(model(near), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, near)
        near = near.detach().add_(gradient.sign_(), alpha=ALPHA).clamp_(low, high)
    return near


def contestants(name: str, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the contestants of a row: functions that attack the images, or that call the model or its copy."""
    copy = frozen_copy(model, x, dtype=torch.float32)
    if name == CALL:
        return {"call": torch.no_grad()(partial(model, x)), "call_copy": torch.no_grad()(partial(copy, x))}
    found = {"expert": partial(pgd_by_expert, model, x, y)}
    if find_spec("torchattacks") is not None:
        theirs = importlib.import_module("torchattacks").PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS)
        found["torchattacks"] = partial(theirs, x, y)
    ours = partial(pgd, x=x, y=y, eps=EPS, steps=STEPS, alpha=ALPHA)
    return found | {"model": partial(ours, model), "copy": partial(ours, copy)}


def example(name: str, images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a row's network, random images, and the labels that the network predicts."""
    model, x = network(name), torch.rand(images, 1, 28, 28)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def measured(name: str, images: int, quick: bool) -> dict:
    """Measure a row, and return its line of the results file."""
    calls = contestants(name, *example(name, 2 if quick else images))
    rounds, seconds = (1, 0.0) if quick else (ROUNDS, SECONDS)

    def clock(who: str, repeats: int) -> float:
        return timing.seconds([calls[who]] * repeats, torch.device("cpu"), time.process_time) / repeats

    # The first calls also prepare what later calls use again, so the shortest of three counts.
    repeats = {who: max(1, round(seconds / min(clock(who, 1) for _ in range(3)))) for who in calls}
    taken = [{who: clock(who, repeats[who]) for who in calls} for _ in range(rounds)]
    medians = {who: f"{1e6 * statistics.median(one[who] for one in taken):.2f}" for who in calls}
    found = {"row": name, "images": images, "rounds": rounds} | {f"{who}_us": medians.get(who, "") for who in TIMED}
    return found | timing.environment(torch.device("cpu"))


def run(names: list[str], quick: bool, out: Path, resume: bool) -> None:
    """Measure all rows if the names contain that of the table, and write the file after every row."""
    rows = {(row["row"], int(row["images"])): row for row in sheets.rows_of(out / FILE) if resume}
    for key in tqdm([key for key in ROWS if NAME in names and key not in rows], desc=NAME, unit=" rows"):
        rows[key] = measured(*key, quick)
        sheets.write_csv(out / FILE, [rows[each] for each in ROWS if each in rows])


def _speeds(row: dict[str, str], base: str, *others: str) -> list[str]:
    """Return the microseconds of a contestant, and how many times as fast the others are."""
    times = [row[f"{who}_us"] for who in (base, *others)]
    return [f"{float(times[0]):,.0f}", *(f"{float(times[0]) / float(us):.2f}" if us else "-" for us in times[1:])]


def table(folder: Path) -> list[str]:
    """Return the table of a folder's file, and a sentence about plain calls."""
    rows = sheets.rows_of(folder / FILE)
    if not rows:
        return ["Nothing has been measured yet."]
    head = "network", "images", "expert, us", "torchattacks", "purify_fast", "purify_fast on a frozen copy"
    body = [[row["row"], row["images"], *_speeds(row, *ATTACKS)] for row in rows if row["row"] != CALL]
    lines = [sheets.measured_on(rows, "row"), "", *sheets.table(head, body)]
    for us, speed in (_speeds(row, "call", "call_copy") for row in rows if row["row"] == CALL):
        text = f"A plain call `model(x)` of two convolutions took {us} us for one image. That of their frozen copy was"
        lines += ["", f"{text} {speed} times as fast."]
    return lines
