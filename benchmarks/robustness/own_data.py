"""Train each method on data of a user's own, kill and resume it, and judge it. Measure how fast images are read.

Each training is a process, which is killed by SIGKILL after its first checkpoint. The same command then continues it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from purify_fast.training.checkpoint import CHECKPOINT, last_checkpoint, read_model

from .. import kept, options
from ..kept import Row
from ..speed import reading, sheets, timing
from ..speed.commands import called

FILE = "own_data.json"


class Kind(NamedTuple):
    """The path of some images, their side, options of their trainings, and the module that trains on them."""

    path: str
    side: int
    options: str = ""
    module: str = "purify_fast"


KINDS = {
    "folder, 3 classes, 64 x 64": Kind("small", 64),
    "folder, 10 classes, 224 x 224": Kind("large", 224, "--padding 0 --resized-crop 0.5"),
    "DataLoader, 3 classes, 64 x 64": Kind("small", 64, module="benchmarks.robustness.own_loader"),
    "`.npz`, 5 classes, 32 x 32, gray": Kind("gray.npz", 32),
}
#: For each method, the name of its command, and options that make the networks and the attacks small.
METHODS = {
    "CARSO": "carso --recipe cifar10 --layers stages.2 stages.3 --cond-dim 8 --latent-dim 4 --samples 2 --steps 1 "
    "--kl-delay 0",
    "AToP": "atop --recipe cifar_rt2 --width 4 --cls-delay 0",
    "ARREST": "arrest --recipe resnet18 --steps 1 --alpha None",
    "diffusion, no recipe": "diffusion --width 8 --patch 4",
}
LENGTH = "--batch-size 8 --epochs 2 --steps-per-epoch 3 --checkpoint-seconds 0"
#: Steps of each training.
STEPS = 6
READING = "2,000 JPEGs at 224 x 224"
#: Training images of the folder at 224 x 224.
TRAIN = 2000


# -- made-up images ----------------------------------------------------------------------------------------------------


def make_folder(root: Path, classes: int, train: int, held_out: int, side: int) -> None:
    """Write JPEGs of different sizes, smooth and with some noise, like photos.

    Args:
        root: folder of the images.
        classes: number of classes.
        train: number of training images.
        held_out: number of held-out images.
        side: the shortest side. Sides are up to 5/4 as long.
    """
    for part, count in (("train", train), ("val", held_out)):
        for number in range(count):
            state, path = np.random.RandomState([number, len(part)]), root / part / f"class{number % classes}"
            width, height = (int(length) for length in state.randint(side, 5 * side // 4 + 1, 2))
            coarse = Image.fromarray(state.randint(0, 256, (6, 6, 3)).astype(np.uint8))
            noisy = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + state.normal(0, 8, (3,))
            path.mkdir(parents=True, exist_ok=True)
            noise = state.normal(0, 8, (height, width, 1))
            Image.fromarray((noisy + noise).clip(0, 255).astype(np.uint8)).save(path / f"{number}.jpg", quality=90)


def make_data(root: Path, train: int = TRAIN) -> None:
    """Write the images of `KINDS` into a folder. ``train`` is the number of training images at 224 x 224."""
    make_folder(root / "small", 3, 48, 9, 64)
    make_folder(root / "large", 10, train, 40, 224)
    x, y = np.random.RandomState(0).randint(0, 256, (50, 32, 32)).astype(np.uint8), np.arange(50) % 5
    np.savez(root / "gray.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])


# -- trainings ---------------------------------------------------------------------------------------------------------


def words_of(kind: Kind, method: str, classifier: str, out: str) -> list[str]:
    """Return the words of the command that trains a method on a kind of data, without the program."""
    name, *small = METHODS[method].split()
    around = [] if name == "diffusion" and kind.module == "purify_fast" else ["--classifier", classifier]
    given = ["--data", kind.path, *around, "--out", out]
    if kind.module != "purify_fast":
        return [name, *given]
    rest = [*small, *LENGTH.split(), *kind.options.split(), "--size", str(kind.side), "--device", "cpu"]
    return ["train", name, *given, *rest]


def trained(name: str, method: str, root: Path) -> Row:
    """Train a method, kill it and let it continue, train it without a kill, and judge it. Return a row.

    Args:
        name: the kind of data, a key of `KINDS`.
        method: a key of `METHODS`.
        root: folder of the data, and of the runs.
    """
    kind, place = KINDS[name], str(root)
    common = ["--data", kind.path, "--size", str(kind.side), "--device", "cpu"]
    classifier, out = f"classifier-{kind.path}", f"run-{ROWS.index((name, method))}"
    if not (root / classifier / "model.safetensors").is_file():
        small = f"--model preact_resnet18 --width 4 {LENGTH}".split()
        called(["train", "classifier", *common, *small, "--out", classifier], place)
    words = words_of(kind, method, classifier, out)
    _, first, memory = called(words, place, module=kind.module, kill_after=root / out / CHECKPOINT)
    step = last_checkpoint(root / out)["step"]
    _, second, more = called(words, place, module=kind.module)
    called(words_of(kind, method, classifier, f"{out}-whole"), place, module=kind.module)
    one, other = (read_model(root / folder)[1] for folder in (out, f"{out}-whole"))
    equal = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    purifier = ["--classifier", classifier, "--eps", "8/255", "--denoising-steps", "2"]
    judge = ["evaluate", out, *common, "--protocol", "fast", "--images", "4", "--steps", "1", "--probes", "False"]
    _, judging, _ = called([*judge, *(purifier if METHODS[method].startswith("diffusion") else [])], place)
    row: Row = {"data": name, "method": method, "killed": step, "seconds": round(first + second, 1)}
    row |= {"MB": round(max(memory, more) / 1e6), "equal": equal, "judging": round(judging, 1)}
    return row


# -- the command and its tables ----------------------------------------------------------------------------------------

ROWS = [*((kind, method) for kind in KINDS for method in METHODS), *((READING, what) for what in reading.READINGS)]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks own_data``."""
    options.add_out(parser, "/cpu")


def main(chosen: argparse.Namespace) -> str:
    """Measure the rows that are missing, and return the tables."""
    out, train = options.out_of(chosen, chosen.quick, "cpu"), 40 if chosen.quick else TRAIN
    done = {(row["data"], row["method"]) for row in kept.rows_of(out / FILE)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_data(root, train)
        for data, what in tqdm([row for row in ROWS if row not in done], desc="own data", unit=" rows"):
            if data == READING:
                row = {"data": data, "method": what, **reading.measured(what, root / "large")}
            else:
                row = trained(data, what, root)
            row |= timing.environment(torch.device("cpu"))
            kept.put(out / FILE, row, lambda one: ROWS.index((one["data"], one["method"])))
    rows = kept.rows_of(out / FILE)
    return "\n".join([*_trainings(rows), "", *_readings(rows)])


def _trainings(rows: list[Row]) -> list[str]:
    head = ["data", "method", "killed after", "seconds", "MB at the peak", "weights as without a kill"]
    head.append("seconds of `evaluate`")
    body = []
    for row in (row for row in rows if row["data"] != READING):
        result = [f"step {row['killed']} of {STEPS}", row["seconds"], row["MB"], "yes" if row["equal"] else "no"]
        body.append([row["data"], row["method"], *result, row["judging"]])
    return sheets.table(head, body)


def _readings(rows: list[Row]) -> list[str]:
    found = [row for row in rows if row["data"] == READING]
    body = [[row["method"], row["seconds"], f"{row['rate']:.0f}" if row["rate"] else ""] for row in found]
    return sheets.table(["what", "seconds", "images a second"], body)


def table(results: Path) -> list[str]:
    """Return the table of the trainings. ``results`` is the folder ``benchmarks/results``."""
    rows = kept.rows_of(results / "cpu" / FILE)
    return [f"Measured on {kept.machines(rows)}.", "", *_trainings(rows)]


def reading_table(results: Path) -> list[str]:
    """Return the table of the reading. ``results`` is the folder ``benchmarks/results``."""
    return _readings(kept.rows_of(results / "cpu" / FILE))
