"""Measure time and memory of evaluations and of training steps on images of 224 x 224 with 1,000 classes.

The networks have random weights, and the labels are the classes that the network predicts, so that attacks have work to
do. Each measurement runs in a separate operating-system process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from purify_fast import Atop, Carso
from purify_fast._memory import peak_resident_memory
from purify_fast.evaluation import EvaluateConfig, evaluate
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import AtopConfig, AtopTask, DeepFillGenerator
from purify_fast.methods.carso import CarsoConfig, CarsoTask
from purify_fast.methods.diffusion import DiffusionConfig, DiffusionTask
from purify_fast.models.foreign import ForeignClassifier
from purify_fast.models.unet import UNet
from purify_fast.training import Batch, TrainingAttack
from purify_fast.training.loop import train_step
from purify_fast.training.task import Task

from .. import kept, options
from ..kept import Row
from ..speed import sheets, timing

FILE = "large_images.json"
EPS, CLASSES, SIDE = 4 / 255, 1000, 224
#: For each network, its name in a library, and the layers that CARSO and ARREST read.
NETWORKS = {
    "ResNet-18 of torchvision": ("torchvision:resnet18", ["model.layer3", "model.layer4"]),
    "ViT-Tiny of timm": ("timm:vit_tiny_patch16_224", ["model.blocks.5", "model.blocks.11"]),
}
#: Images of an evaluation, and of a training step.
IMAGES, BATCH = 20, 8
#: Steps of the attack in a training step.
STEPS = 2


def classifier(name: str, classes: int) -> nn.Module:
    """Return a network of `NETWORKS` with random weights."""
    torch.manual_seed(0)
    return ForeignClassifier(NETWORKS[name][0], 3, classes, 0.5, 0.5).eval()


def images(count: int, side: int) -> torch.Tensor:
    """Return smooth random images ``[count, 3, side, side]`` in [0, 1]."""
    coarse = torch.rand(count, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


def fast(name: str, count: int) -> tuple[float, str]:
    """Evaluate a network by the protocol ``fast``. Return the seconds, and the result in words."""
    model, x = classifier(name, CLASSES), images(count, SIDE)
    with torch.no_grad():
        y = model(x).argmax(1)
    began = time.perf_counter()
    report = evaluate(model, x, y, eps=EPS, config=EvaluateConfig(protocol="fast"), progress=False)
    robust = report.rows[-1].robust
    return time.perf_counter() - began, f"{int(robust.sum())} of {len(x)} images withstand"


def _carso(name: str) -> Task:
    defence = Carso(classifier(name, CLASSES), NETWORKS[name][1], (3, SIDE, SIDE), 512, 128, 8)
    return CarsoTask(defence, CarsoConfig(attack=TrainingAttack(eps=EPS, steps=STEPS), kl_delay=0.0, train_samples=2))


def _atop(name: str) -> Task:
    # The published size is 256. A vision transformer takes images of one size only.
    side = 256 if name.startswith("ResNet") else SIDE
    defence = Atop(classifier(name, CLASSES), DeepFillGenerator(5), (3, side, side))
    return AtopTask(defence, AtopConfig(attack=TrainingAttack(eps=EPS, steps=STEPS), attack_method="pgd", cls_delay=0))


def _arrest(name: str) -> Task:
    config = ArrestConfig(attack=TrainingAttack(eps=EPS, steps=STEPS))
    return ArrestTask(classifier(name, CLASSES), config, (3, SIDE, SIDE), NETWORKS[name][1][-1:])


def _diffusion(_: str) -> Task:
    torch.manual_seed(0)
    return DiffusionTask(UNet(3, 32, patch=4), DiffusionConfig())


#: For each training, a function that makes its task from the name of a network.
TRAININGS: dict[str, Callable[[str], Task]] = {
    "a step of CARSO": _carso,
    "a step of AToP": _atop,
    "a step of ARREST": _arrest,
    "a step of diffusion": _diffusion,
}


def step(name: str, training: str) -> tuple[float, str]:
    """Take two training steps. Return the seconds of the second step, and its loss in words."""
    task = TRAININGS[training](name)
    side = task.model.image_shape[1] if isinstance(task.model, Atop) else SIDE
    x = images(BATCH, side)
    batch = Batch(x, torch.arange(len(x)) % CLASSES, torch.arange(len(x)), 7, 5, 10)
    for _ in range(2):
        began = time.perf_counter()
        loss = train_step(task, batch)["loss"]
    return time.perf_counter() - began, f"loss {float(loss):.4g}"


def measured(name: str, what: str, quick: bool) -> Row:
    """Measure a row of the table in this process."""
    if what in TRAININGS:
        count, (seconds, result) = BATCH, step(name, what)
    else:
        count = 2 if quick else IMAGES
        seconds, result = fast(name, count)
    row: dict[str, Any] = {"network": name, "what": what, "images": count, "seconds": round(seconds, 2)}
    row |= {"MB": round(peak_resident_memory() / 1e6), "result": result}
    return row | timing.environment(torch.device("cpu"))


ROWS = [(name, what) for name in NETWORKS for what in ("the protocol `fast`", *TRAININGS)]
#: Diffusion has no classifier in its training.
ROWS.remove(("ViT-Tiny of timm", "a step of diffusion"))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks large_images``."""
    options.add_out(parser, "/cpu")


def main(chosen: argparse.Namespace) -> str:
    """Measure the rows that are missing, and return the table."""
    out = options.out_of(chosen, chosen.quick, "cpu")
    done = {(row["network"], row["what"]) for row in kept.rows_of(out / FILE)}
    for name, what in tqdm([row for row in ROWS if row not in done], desc="large images", unit=" rows"):
        # Use a new process for each row, because the recorded peak memory of a process never falls.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(measured, name, what, chosen.quick).result()
        kept.put(out / FILE, row, lambda one: ROWS.index((one["network"], one["what"])))
    return "\n".join(_table(kept.rows_of(out / FILE)))


def _table(rows: list[Row]) -> list[str]:
    head = ["network", "what", "images", "seconds", "MB at the peak", "result"]
    body = [[str(row[key]) for key in ("network", "what", "images", "seconds", "MB", "result")] for row in rows]
    return sheets.table(head, body)


def table(results: Path) -> list[str]:
    """Return the table of docs/performance.md or of another page.

    Args:
        results: the folder ``benchmarks/results``.
    """
    rows = kept.rows_of(results / "cpu" / FILE)
    return [f"Measured on {kept.machines(rows)}.", "", *_table(rows)]
