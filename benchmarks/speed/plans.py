"""Compare the predictions of ``purify-fast plan`` with the time (with Python's start) and the memory of the runs."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from purify_fast._memory import peak_resident_memory

from .. import RESULTS, kept, options
from . import sheets, timing

FILE = "cpu/plan.json"
#: The largest factors between prediction and measurement that the documentation promises.
MOST_TIME, MOST_MEMORY = 1.5, 1.3
#: For each run its command, in the order of the table. {data} stands for the folder of --data.
RUNS = {
    "train a classifier, MNIST": (
        "train classifier --data {data}/mnist.npz --eps 0.3 --steps 3 --width 8 --epochs 1 --steps-per-epoch 250"
    ),
    "train CARSO, digits": "train carso --classifier zoo:digits-pgd-at --eps 0.2 --steps 10 --epochs 20",
    "train AToP, digits": (
        "train atop --init None --classifier zoo:digits-pgd-at --cls-delay 2000 --batch-size 64 --epochs 10"
    ),
    "train ARREST, digits": "train arrest --classifier zoo:digits-standard --eps 0.2 --steps 10 --epochs 20",
    "train a denoiser, MNIST": "train diffusion --data {data}/mnist.npz --width 8 --epochs 1 --steps-per-epoch 150",
    "evaluate digits-pgd-at, fast": "evaluate zoo:digits-pgd-at --protocol fast --images 500",
    "evaluate mnist-pgd-at, standard": "evaluate zoo:mnist-pgd-at --data {data}/mnist.npz --images 100",
    "evaluate digits-carso-pipeline, fast": "evaluate zoo:digits-carso-pipeline --protocol fast --images 100",
    "evaluate cifar10-pgd-at-w16, fast": (
        "evaluate zoo:cifar10-pgd-at-w16 --data {data}/cifar10.npz --protocol fast --images 100"
    ),
}
_SECONDS = {"s": 1, "min": 60, "h": 3600}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks plan``."""
    options.add_names(parser, RUNS, what="runs")
    parser.add_argument(
        "--data", type=Path, default="data", help="folder with mnist.npz and cifar10.npz; default: data"
    )


def called(
    words: list[str], folder: str, *, module: str = "purify_fast", kill_after: Path | None = None
) -> tuple[str, float, float]:
    """Run ``purify-fast`` or another module in a process.

    Args:
        words: the words after ``purify-fast``.
        folder: the working folder of the process.
        module: the module that is run, as by ``python -m``.
        kill_after: a file of the process. As soon as the file exists, the process is killed by SIGKILL. None kills
            nothing.

    Returns:
        The printed text, the seconds, and the peak of the process's memory in bytes.

    Raises:
        RuntimeError: the command failed, or ended before it could be killed.
    """
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    began, shown = time.monotonic(), Path(folder) / "printed.txt"
    with shown.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words], cwd=folder, env=environment, stdout=output, stderr=output
        )
        memory = 0
        while process.poll() is None:
            # A process that has ended no longer tells its peak.
            memory = max(memory, peak_resident_memory(process.pid))
            if kill_after is not None and kill_after.is_file():
                process.kill()
            time.sleep(0.005)
    seconds = time.monotonic() - began
    if process.returncode != (0 if kill_after is None else -signal.SIGKILL):
        name = "purify-fast" if module == "purify_fast" else module
        raise RuntimeError(f"{name} {' '.join(words)} ended with {process.returncode}:\n{shown.read_text()}")
    return shown.read_text(), seconds, memory


def read(text: str) -> tuple[float, float]:
    """Return the seconds and the bytes that the text of a plan predicts.

    Raises:
        ValueError: the text has no prediction.
    """
    found = re.search(r"^time +(\d+(?:\.\d+)?) (s|min|h)\nmemory at the peak +(\d+\.\d+) GB$", text, re.M)
    if found is None:
        raise ValueError(f"the text must have the lines of time and memory that purify-fast plan prints, got {text!r}")
    return float(found[1]) * _SECONDS[found[2]], float(found[3]) * 1e9


def measured(name: str, data: Path) -> kept.Row:
    """Predict and measure a run. Return one row of the results file.

    Args:
        name: name of the run in `RUNS`.
        data: folder with mnist.npz and cifar10.npz.
    """
    words = [*RUNS[name].format(data=data.resolve()).split(), "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        text, planning, _ = called(["plan", *words], folder)
        _, seconds, memory = called([*words, "--out", "run"], folder)
    expected_seconds, expected_memory = read(text)
    return {
        "run": name,
        "command": RUNS[name].format(data="DIR"),
        "seconds_of_plan": round(planning, 1),
        "predicted_seconds": expected_seconds,
        "measured_seconds": round(seconds, 1),
        "predicted_memory": expected_memory,
        "measured_memory": memory,
        **timing.environment(torch.device("cpu")),
    }


def main(chosen: argparse.Namespace) -> Path:
    """Run ``python -m benchmarks plan``. Each named run is measured, and replaces its row."""
    path, names = RESULTS / FILE, list(RUNS)

    def place(row: kept.Row) -> int:
        return names.index(row["run"]) if row["run"] in names else -1

    for name in tqdm(chosen.names, desc="plan", unit=" runs"):
        kept.put(path, measured(name, chosen.data), key=place, keep=lambda row: place(row) >= 0)
    return path


def factors(row: kept.Row) -> tuple[float, float]:
    """Return how many times the measured time and the measured memory a prediction is."""
    return tuple(row[f"predicted_{what}"] / row[f"measured_{what}"] for what in ("seconds", "memory"))  # type: ignore[return-value]


def table(results: Path) -> list[str]:
    """Return the table of docs/command_line.md, with the prediction and the measurement of each run.

    Args:
        results: the folder ``benchmarks/results``.

    Raises:
        FileNotFoundError: there are no results.
    """
    rows: list[dict[str, Any]] = kept.rows_of(results / FILE)
    if not rows:
        raise FileNotFoundError(results / FILE)
    body = []
    for row in rows:
        time_factor, memory_factor = factors(row)
        seconds = (f"{row['predicted_seconds']:.0f}", f"{row['measured_seconds']:.0f}", f"{time_factor:.2f}")
        memory = (f"{row['predicted_memory'] / 1e6:.0f}", f"{row['measured_memory'] / 1e6:.0f}", f"{memory_factor:.2f}")
        body.append([row["run"], *seconds, *memory])
    head = ["run", "s, predicted", "s, measured", "factor", "MB, predicted", "MB, measured", "factor"]
    return [f"{kept.machines(rows)}.", "", *sheets.table(head, body)]
