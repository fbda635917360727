"""Compare the certificates of `certify` with Cohen et al.'s test of a fixed number of draws, on images of MNIST.

The test (ICML 2019, arXiv 1902.02918, section 3.2) chooses a class by 100 draws. It certifies the class at the radius r
if the lower Clopper-Pearson bound of its probability, from 100,000 further draws, is above Phi(r / sigma).
"""

from __future__ import annotations

import argparse
import json
import time
from operator import itemgetter
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor, nn

from purify_fast import zoo
from purify_fast.data import balanced_subset, load_dataset, to_float
from purify_fast.evaluation import Certificates, certify
from purify_fast.judge.show.text import markdown_table
from purify_fast.speed.frozen_copy import frozen_copy

from .. import kept, options
from ..kept import Row
from ..speed import timing

MODEL, SIGMA, RADIUS, ALPHA = "mnist-smoothed", 0.5, 0.5, 0.001
CHOOSING, DRAWS, TOGETHER = 100, 100_000, 200
IMAGES, PART = 500, 25
#: The denoiser of the one-shot purifier, and the largest number of draws of an image with it.
PURIFIER, ITS_DRAWS = "mnist-diffpure", 2000
#: The models whose images get their largest radius, each from so many draws.
LARGEST, OF_EACH = ("digits-smoothed", "mnist-smoothed"), 10_000
FILE = "certificates.json"


def classes_of_draws(model: nn.Module, image: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Count the classes that the model gives to noisy copies of an image, int64 ``[10]``."""
    counts = torch.zeros(10, dtype=torch.int64)
    for start in range(0, draws, TOGETHER):
        noise = torch.randn(min(TOGETHER, draws - start), *image.shape, generator=generator)
        counts += torch.bincount(model(image + SIGMA * noise).argmax(1), minlength=10)
    return counts


def cohen_part(model: nn.Module, x: Tensor, y: Tensor, part: int) -> Row:
    """Run the test on some images. The counts of the chosen class decide, and are kept."""
    chosen, right, began = [], [], time.process_time()
    for number in range(part * PART, (part + 1) * PART):
        generator = torch.Generator().manual_seed(1_000_000 + number)
        chosen.append(int(classes_of_draws(model, x[number], CHOOSING, generator).argmax()))
        right.append(int(classes_of_draws(model, x[number], DRAWS, generator)[chosen[-1]]))
    lists = {"class": chosen, "label": y[part * PART : (part + 1) * PART].tolist(), "right": right}
    texts = {name: " ".join(map(str, values)) for name, values in lists.items()}
    return {"kind": "cohen", "part": part, "seconds": round(time.process_time() - began, 1), **texts}


def numbers(text: str) -> np.ndarray:
    """Read whole numbers that spaces separate."""
    return np.array(text.split(), dtype=np.int64)


def cohen_decisions(rows: list[Row]) -> np.ndarray:
    """Return the images that the test certifies with their true class, bool ``[N]``."""
    chosen, labels, right = (numbers(" ".join(row[name] for row in rows)) for name in ("class", "label", "right"))
    lower = beta.ppf(ALPHA, right, DRAWS - right + 1)
    return np.asarray((chosen == labels) & (lower > NormalDist().cdf(RADIUS / SIGMA)))


def plain_loop(model: nn.Module, x: Tensor, draws: int) -> float:
    """Return the processor seconds in which the model predicts a number of draws of each image, 200 at a time."""
    generator, began = torch.Generator().manual_seed(0), time.process_time()
    for image in x:
        classes_of_draws(model, image, draws, generator)
    return time.process_time() - began


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks certificates``."""
    parser.add_argument("--data-root", type=Path, help="folder with mnist.npz, or with the official files")
    options.add_out(parser, "", quick=False)


def _held_out(name: str, root: Path | None) -> tuple[Tensor, Tensor]:
    data = load_dataset(name, root)
    return data.x_test, data.y_test


@torch.no_grad()
def main(chosen: argparse.Namespace) -> Path:
    """Make the certificates, then those parts of Cohen's test that are missing. Return the path of the results."""
    path = options.out_of(chosen, False, "") / FILE
    data = load_dataset("mnist", chosen.data_root)
    subset = balanced_subset(data.x_test, data.y_test, IMAGES, 0, num_classes=10)
    x, y = to_float(subset.x), subset.y
    model, purifier = zoo.load(MODEL), zoo.load(PURIFIER).one_shot(SIGMA)

    def put(row: Row) -> None:
        kept.put(path, row | timing.environment(torch.device("cpu")), key=itemgetter("kind", "part"))

    for kind, whose, most in (("ours", model, DRAWS), ("one_shot", purifier, ITS_DRAWS)):
        began = time.process_time()
        made = certify(whose, x, y, sigma=SIGMA, radius=RADIUS, alpha=ALPHA, draws=most, name=kind, batch_size=200)
        seconds = time.process_time() - began
        counts = {"right": " ".join(map(str, made.right)), "draws": " ".join(map(str, made.draws))}
        row = {"kind": kind, "part": 0, "seconds": round(seconds, 1), "most": most, **counts}
        if kind == "one_shot":
            # The loop that a user would write takes the same number of draws for each image.
            row["loop"] = round(plain_loop(whose, x[:10], ITS_DRAWS) * len(x) / 10, 1)
        put(row)
    for name in LARGEST:
        card = zoo.card(name)
        chosen_images = balanced_subset(*_held_out(card.data, chosen.data_root), IMAGES, 0, num_classes=10)
        at: dict[str, Any] = {"sigma": card.sigma, "draws": OF_EACH, "index": chosen_images.ids, "batch_size": 200}
        made = certify(zoo.load(name), *chosen_images[:2], alpha=ALPHA, name=name, **at)
        text = json.dumps(json.loads(made.to_json()))
        put({"kind": name, "part": 0, "seconds": float(made.about["seconds"]), "certificates": text})
    fast = frozen_copy(model, x[:8], dtype=torch.float32)
    done = {row["part"] for row in kept.rows_of(path) if row["kind"] == "cohen"}
    for part in sorted(set(range(IMAGES // PART)) - done):
        put(cohen_part(fast, x, y, part))
    return path


def certificates_of(row: Row) -> Certificates:
    """Return the certificates of a row of `certify`."""
    right, draws = (numbers(row[name]) for name in ("right", "draws"))
    return Certificates(right, draws, sigma=SIGMA, radii=(RADIUS,), alpha=ALPHA)


def table(results: Path) -> list[str]:
    """Return the lines of the table on docs/certify.md."""
    rows = json.loads((results / FILE).read_text())
    named, body = {row["kind"]: row for row in rows}, []
    for kind, what in (("ours", f"`certify`, `{MODEL}`"), ("one_shot", f"`certify`, `{PURIFIER}` in one step")):
        row, made = named[kind], certificates_of(named[kind])
        decided = [int((made.decisions(RADIUS) == each).sum()) for each in (1, 0)]
        body.append([what, *map(str, decided), *_spent(made.draws), f"{row['seconds']:.1f}"])
    tested = [row for row in rows if row["kind"] == "cohen"]
    draws = np.full(PART * len(tested), CHOOSING + DRAWS)
    seconds = sum(row["seconds"] for row in tested)
    certified = cohen_decisions(tested)
    body.append([f"Cohen et al., `{MODEL}`", str(int(certified.sum())), "-", *_spent(draws), f"{seconds:,.0f}"])
    lines = markdown_table(["", "certified", "undecided", "draws, median", "draws in all", "processor seconds"], body)
    ours = certificates_of(named["ours"])
    same, factor = int((ours.certified(RADIUS)[: len(certified)] == certified).sum()), draws[0] / np.median(ours.draws)
    alike = f"The first and the last line decide alike on {same} of {len(certified)} images."
    fewer = f"All images together need {draws.sum() / ours.draws.sum():,.0f} times fewer draws, for one radius; in the"
    fewer += f" median an image needs {factor:,.0f} times fewer. Cohen's draws answer every radius."
    fewer += f" {kept.machines([named['ours']])}; the last line: {kept.machines(tested)}."
    loop = f"A loop of {ITS_DRAWS:,} draws for each image takes {named['one_shot']['loop']:,.0f} processor seconds with"
    lines += ["", f"{alike} {fewer} {loop} the model of the second line."]
    return lines


def largest(results: Path) -> list[str]:
    """Return the lines of the table of the largest radii on docs/certify.md."""
    rows = {row["kind"]: row for row in json.loads((results / FILE).read_text())}
    made = [Certificates.from_json(rows[name]["certificates"]) for name in LARGEST]
    radii = sorted({radius for one in made for radius in one.shown})
    lines = [one.summary(radii) for one in made]
    head = [*lines[0]]
    lines = markdown_table(head, [[f"`{line.pop('model')}`", *line.values()] for line in lines])
    return [*lines, "", f"{kept.machines([rows[LARGEST[0]]])}, beside other programs."]


def _spent(draws: np.ndarray) -> list[str]:
    return [f"{int(np.median(draws)):,}", f"{int(draws.sum()):,}"]
