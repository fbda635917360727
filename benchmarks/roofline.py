"""A model of the time of a step of each attack and training on an H100, counted and not measured.

A step takes at least the longest of three times: the host launches its operators, the memory moves their bytes, and the
tensor cores compute their products. All three are counted on the CPU as PyTorch dispatches a step at two batch sizes,
and extrapolated linearly to others. The model is made to be tested by measurements on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from purify_fast.attacks import apgd, fab_t, square
from purify_fast.attacks.attacked_model import frozen
from purify_fast.attacks.objective import Objective
from purify_fast.methods.atop import Atop, AtopTask, SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models import PreActResNet18
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops.dispatch import registry
from purify_fast.ops.dispatch.racing import Launches
from purify_fast.speed.counting import EAGER, GPUS, REPLAYED, SHARE, counted
from purify_fast.speed.folding.batchnorm import fold_batchnorm
from purify_fast.speed.graphs.host_syncs import HostSyncs
from purify_fast.speed.graphs.step_graphs import StepGraphs
from purify_fast.training import Batch
from purify_fast.training.config import TrainingAttack

from . import RESULTS, report
from .launches import Replays, arrest, atop, served

FILE = "roofline.csv"
H100 = GPUS["h100"]
#: The attacks whose step is modelled.
STEPS = ("APGD-100 ce", "APGD-T 100", "FAB-T 100", "Square")
#: The batch sizes at which a step is counted, and those for which it is modelled.
COUNTED, BATCHES = (4, 8), (16, 64, 250)
#: The numbers of steps with which the operators of a step are counted.
COUNTED_STEPS = (20, 40)
SHAPE, CLASSES, EPS = (3, 32, 32), 10, 8 / 255
#: ARREST's threshold beyond any drift, so that every image is attacked.
NEVER_REPLAYED = 10.0
#: A run of each attack, by the beginning of its name in a report.
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "APGD-10 margin": partial(apgd, loss="margin"),
    "APGD-100 ce": apgd,
    "APGD-T 100 margin": partial(apgd, loss="margin_targeted", n_target_classes=1),
    "APGD-T 100": partial(apgd, loss="dlr_targeted", n_target_classes=1),
    "FAB-T 100": partial(fab_t, n_target_classes=1),
    "Square": lambda *args, steps, **options: square(*args, n_queries=steps, **options),
}


class Half(nn.Module):
    """A classifier in the form whose gradients attacks use on a GPU: BatchNorm folded, bfloat16, channels last.

    Args:
        model: the classifier.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        fold_batchnorm(model.eval(), torch.rand(1, *SHAPE))
        self.inner = model.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(torch.bfloat16, memory_format=torch.channels_last)).float()


class Count(NamedTuple):
    """The work of a step for host, memory and tensor cores.

    Args:
        launches: number of operators that the host launches.
        beside: number of launches with everything captured that can be; a replay counts as one.
        bytes: bytes read and written.
        flop: FLOP of products.
    """

    launches: float
    beside: float
    bytes: float
    flop: float


def per_step(model: nn.Module, x: Tensor, attack: Callable[..., Tensor], captures: bool) -> tuple[float, float]:
    """Count the operators that a step launches, and those that wait for the device.

    Args:
        model: images to logits.
        x: images ``[B, C, H, W]``, with the model's own classes as labels, so that no image falls.
        attack: one of `ATTACKS`.
        captures: whether to capture everything that can be captured.
    """
    y, replays = model(x).argmax(1).detach(), Replays()
    options: dict[str, Any] = {"eps": 1e-6}
    if captures and attack is not ATTACKS["Square"]:
        options["graphs"] = StepGraphs("always", capture=replays)
    launched, waited = [], []
    for steps in COUNTED_STEPS:
        # The first of these runs captures everything that can be captured.
        attack(model, x, y, steps=steps, **options)
        replays.replayed = 0
        with HostSyncs() as waits, Launches() as launches:
            attack(model, x, y, steps=steps, **options)
        launched.append(launches.count + replays.replayed)
        waited.append(sum(waits.counts.values()))
    steps = COUNTED_STEPS[1] - COUNTED_STEPS[0]
    return (launched[1] - launched[0]) / steps, (waited[1] - waited[0]) / steps


def of_model(name: str, model: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """A model's work in a step of an attack: the gradient of its loss, for Square a forward pass; see `counted`.

    Args:
        name: of the attack.
        model: images to logits.
        x: images ``[B, C, H, W]``.
    """
    with frozen(model), torch.no_grad():
        labels = model(x).topk(2, 1).indices
        if name == "Square":
            return counted(lambda: model(x))
        return counted(lambda: Objective(model, "margin_targeted").gradient(x, labels))


def kernels_serve() -> contextlib.AbstractContextManager[Any]:
    """Within the block, every op counts as one operator, like a kernel, even if a CPU has no kernel."""
    return mock.patch.object(registry.Op, "uses_reference", lambda *given: False)


def of_attack(name: str, size: int) -> Count:
    """Count a step of an attack on a ResNet-18 that no image falls to.

    The attack's own work is counted on a tiny network, whose share is subtracted.

    Args:
        name: name of the attack, in `ATTACKS`.
        size: number of images.
    """
    torch.manual_seed(0)
    x, attack = torch.rand(size, *SHAPE), ATTACKS[name]
    tiny = SmallCNN(SHAPE[0], CLASSES, SHAPE[1:], 4).eval()
    large = Half(_network())
    y = tiny(x).argmax(1)
    with kernels_serve():
        beside, _ = per_step(tiny, x, attack, True)
        short, long = (
            counted(lambda steps=steps: attack(tiny, x, y, steps=steps, eps=1e-6)) for steps in COUNTED_STEPS
        )
        models = of_model(name, tiny, x), of_model(name, large, x)
    steps = COUNTED_STEPS[1] - COUNTED_STEPS[0]
    launches, moved, flop = (
        (b - a) / steps - small + big for a, b, small, big in zip(short, long, *models, strict=True)
    )
    # A query of Square is not captured.
    return Count(launches, launches if name == "Square" else beside, moved, flop)


def _network() -> nn.Module:
    return PreActResNet18(num_classes=CLASSES)


def _carso() -> CarsoTask:
    defence = Carso(_network(), ["stages.1", "stages.3"], SHAPE, 128, 128, 8)
    return CarsoTask(defence, CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=EPS, steps=10)))


def _atop() -> AtopTask:
    return atop("classifier", 10, Atop(_network(), SmallGenerator(SHAPE[0]), SHAPE, block=4, sigma=0.1), EPS)


#: A step of each training of a ResNet-18 and its other networks, in float32 (TF32 for products).
TRAININGS: dict[str, Callable[[], Any]] = {
    "ARREST, PGD-10": lambda: arrest(10, _network, SHAPE, EPS, tau=NEVER_REPLAYED),
    "CARSO, pipeline, PGD-10": _carso,
    "AToP, paper's objective, FGSM": _atop,
}


def of_training(make: Callable[[], Any], size: int) -> Count:
    """Count a step of a training, forward and backward.

    Args:
        make: makes its task.
        size: number of images.
    """
    torch.manual_seed(0)
    x = torch.rand(size, *SHAPE)
    batch = Batch(x, torch.arange(size) % CLASSES, torch.arange(size), 7, 0, 10)
    task, replays = make(), Replays()
    task.model.train()
    task.training_step(batch)[0].backward()
    launches, moved, flop = counted(lambda: task.training_step(batch)[0].backward())
    task.graphs = StepGraphs("always", capture=replays)
    task.training_step(batch)[0].backward()
    replays.replayed = 0
    with Launches() as beside:
        task.training_step(batch)[0].backward()
    return Count(launches, beside.count + replays.replayed, moved, flop)


def continued(counts: tuple[Count, Count], size: int) -> Count:
    """The count for another batch: bytes and products extrapolated linearly, launches of the larger batch.

    Args:
        counts: counts of the batches of `COUNTED`.
        size: number of images of the other batch.
    """
    first, second = counts
    share = (size - COUNTED[0]) / (COUNTED[1] - COUNTED[0])
    moved, flop = (a + (b - a) * share for a, b in ((first.bytes, second.bytes), (first.flop, second.flop)))
    return Count(second.launches, second.beside, moved, flop)


def row_of(step: str, count: Count, size: int, rate: float) -> dict[str, Any]:
    """The model of one step.

    Args:
        step: name of the step.
        count: work of the step.
        size: number of images.
        rate: largest FLOP/s.
    """
    memory, products = count.bytes / H100.bytes_per_second, count.flop / (SHARE * rate)
    launching = count.launches * EAGER
    graph = count.launches - count.beside
    replaying = max(count.beside * EAGER, graph * REPLAYED)
    eager = {"launches": launching, "bytes": memory, "products": products}
    captured = {**eager, "launches": replaying}
    return {
        "step": step,
        "images": size,
        "launches": round(count.launches),
        "launches_captured": round(count.beside),
        "MB": round(count.bytes / 1e6, 1),
        "GFLOP": round(count.flop / 1e9, 2),
        **{f"{name}_ms": f"{1e3 * value:.3g}" for name, value in eager.items()},
        "launches_captured_ms": f"{1e3 * replaying:.3g}",
        "eager_ms": f"{1e3 * max(eager.values()):.3g}",
        "eager_bound": max(eager, key=eager.__getitem__),
        "captured_ms": f"{1e3 * max(captured.values()):.3g}",
        "captured_bound": max(captured, key=captured.__getitem__),
    }


def write(results: Path) -> Path:
    """Count, and write ``roofline.csv`` into the folder of results.

    Args:
        results: the folder.
    """
    steps: list[tuple[str, float, Callable[[int], Count]]]
    steps = [(name, H100.bfloat16, partial(of_attack, name)) for name in STEPS]
    steps += [(name, H100.tf32, partial(of_training, make)) for name, make in TRAININGS.items()]
    rows = []
    with served("by rule"):
        for name, rate, count in tqdm(steps, desc="roofline", unit=" steps"):
            counts = count(COUNTED[0]), count(COUNTED[1])
            rows += [row_of(name, continued(counts, size), size, rate) for size in BATCHES]
    path = results / FILE
    report.write_csv(path, rows)
    return path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks roofline``."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")


def main(chosen: argparse.Namespace) -> Path:
    """``python -m benchmarks roofline``."""
    return write(chosen.out)


#: The columns of the table: the name of each, and its column in the file.
COLUMNS = {
    "step": "step", "images": "images", "operators": "launches", "beside a graph": "launches_captured", "MB": "MB",
    "GFLOP": "GFLOP", "launches, ms": "launches_ms", "captured": "launches_captured_ms", "bytes, ms": "bytes_ms",
    "products, ms": "products_ms", "eager, ms": "eager_ms", "bound by": "eager_bound", "captured, ms": "captured_ms",
    "bound by ": "captured_bound",
}  # fmt: skip


def table(results: Path) -> list[str]:
    """The results of `write`, for docs/performance.md."""
    rows = report.read_csv(results / FILE)
    return report.table([head.strip() for head in COLUMNS], [[row[name] for name in COLUMNS.values()] for row in rows])
