"""Time gradients of images in one and in all threads, on an idle machine and beside busy processes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from purify_fast import zoo
from purify_fast.attacks.objective import Objective
from purify_fast.models import SmallCNN
from purify_fast.speed.threads import fastest_threads

from .. import RESULTS, kept
from . import sheets, timing

FILE = "cpu/neighbors.json"
IMAGES, BUSY = 32, 2
#: By the name of a network, the shape of an image and the function that makes the network.
NETWORKS = {
    "digits-pgd-at": ((1, 16, 16), partial(zoo.load, "digits-pgd-at")),
    "SmallCNN, 32 x 32": ((3, 32, 32), partial(SmallCNN, 3, 10, (32, 32))),
    "cifar10-pgd-at-w16": ((3, 32, 32), partial(zoo.load, "cifar10-pgd-at-w16")),
}
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
#: For each column of the table, the environment, and the number of threads; 0: all threads, None: the fastest number.
FORMS = {
    "1 thread": ({}, 1),
    "all, spinning": ({}, 0),
    "all, passive": (PASSIVE, 0),
    "fastest, passive": (PASSIVE, None),
}
#: A busy process ends by itself, also if this process is killed.
SPIN = "import time\nend = time.monotonic() + 300\nwhile time.monotonic() < end:\n    pass"


def child(threads: int | None, seconds: float) -> None:
    """Print the milliseconds of a gradient and the number of threads for each network. A process of its own runs it."""
    timed, present = {}, torch.get_num_threads()
    for name, (shape, make) in NETWORKS.items():
        torch.set_num_threads(threads or present)
        x, y = torch.rand(IMAGES, *shape), torch.zeros(IMAGES, dtype=torch.int64)
        step = partial(Objective(make().eval().requires_grad_(False), "ce").gradient, x, y)
        if threads is None:
            torch.set_num_threads(fastest_threads(step))
        step()
        count, began = 0, time.perf_counter()
        while not count or time.perf_counter() - began < seconds:
            step()
            count += 1
        timed[name] = [1000 * (time.perf_counter() - began) / count, torch.get_num_threads()]
    print(json.dumps(timed))


def busy_cores() -> float:
    """Return how many cores all processes of this machine use, measured for a second (Linux only)."""
    used = []
    for _ in range(2):
        used.append(sum(map(int, Path("/proc/stat").read_text().split()[1:4])))
        time.sleep(1 - len(used) // 2)
    return (used[1] - used[0]) / os.sysconf("SC_CLK_TCK")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks neighbors``."""
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each network and number of threads")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, BUSY], help="numbers of busy processes")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait until no other process computes")


def main(chosen: argparse.Namespace) -> Path:
    """Run ``python -m benchmarks neighbors``. The rows with the same numbers of busy processes are replaced."""
    kept_environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    for beside, (form, (settings, threads)) in tqdm([*product(chosen.busy, FORMS.items())], unit=" forms"):
        code = f"from benchmarks.speed.neighbors import child\nchild({threads}, {chosen.seconds})"
        until = time.monotonic() + chosen.wait
        while (others := busy_cores()) > 0.2 and time.monotonic() < until:
            pass
        with contextlib.ExitStack() as stack:
            for _ in range(beside):
                stack.callback(stack.enter_context(subprocess.Popen([sys.executable, "-c", SPIN])).kill)
            environment = kept_environment | settings
            printed = subprocess.check_output([sys.executable, "-c", code], env=environment, timeout=300)
        row = {"form": form, "busy": beside, "others": others, "ms": json.loads(printed)}
        row |= timing.environment(torch.device("cpu"))
        kept.put(RESULTS / FILE, row, key=lambda row: (row["busy"], list(FORMS).index(row["form"])))
    return RESULTS / FILE


def table(results: Path) -> list[str]:
    """Return the table of docs/speed.md: the milliseconds of a gradient, by network and number of busy processes."""
    rows = kept.existing(results / FILE)
    body = []
    for network, beside in product(NETWORKS, sorted({row["busy"] for row in rows})):
        own = [row for row in rows if row["busy"] == beside]
        others = f"{max(row['others'] for row in own):.1f}"
        timed = [row["ms"][network] for row in own]
        body.append([network, beside, others, *(f"{ms:.1f}" for ms, _ in timed), timed[-1][1]])
    what = f"Milliseconds of a gradient of {IMAGES} images; *other cores*: cores that other programs used just before."
    head = ["network", "busy processes", "other cores", *FORMS, "fastest number"]
    return [f"{kept.machines(rows)}. {what}", "", *sheets.table(head, body)]
