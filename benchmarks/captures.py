"""Counts of CUDA graphs captured and replayed by an evaluation, without a GPU.

An evaluation with the protocol "standard" runs on the CPU as it would on a GPU: its batches have a GPU's sizes, and a
function that is run again stands for each graph. Each attack's captures and replays are counted. Square's queries are
not run: they would take most of the time, and Square has no step that could be captured. A second count covers the
operators that a step of each attack dispatches when kernels serve: launched one by one, and beside a graph's replay.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from purify_fast import zoo
from purify_fast.attacks import Square, apgd, fab_t, square
from purify_fast.attacks.attacked_model import frozen
from purify_fast.attacks.engine import rows
from purify_fast.attacks.objective import Objective
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation import evaluate, measure
from purify_fast.ops.dispatch import registry
from purify_fast.ops.dispatch.tune import Launches
from purify_fast.speed.counting import counted
from purify_fast.speed.graphs.host_syncs import HostSyncs
from purify_fast.speed.graphs.step_graphs import WORTH, CudaGraphs, State, StepFunction, StepGraphs, Steps

from . import RESULTS, options, report
from .launches import Replays

FILE = "captures.csv"
#: Usual numbers of images of an evaluation, and of a batch.
IMAGES, BATCH = 1000, 250
#: Numbers of images and steps with which the operators of a step are counted.
COUNTED_IMAGES, COUNTED_STEPS = 16, (20, 40)
#: Number of images from which those are chosen, and of a random model's draws for the choice.
CANDIDATES, DRAWS = 250, 100


class Run(NamedTuple):
    """One evaluation.

    Args:
        model: name of a model of the zoo.
        data: its data set.
        eps: the radius in linf, in image units.
    """

    model: str
    data: str
    eps: float


#: Each model at a radius where few images fall, and at a radius where many do.
RUNS = [
    Run("digits-pgd-at", "digits", 0.05),
    Run("digits-pgd-at", "digits", 0.2),
    Run("cifar10-pgd-at-w16", "cifar10", 1 / 255),
    Run("cifar10-pgd-at-w16", "cifar10", 8 / 255),
]


@dataclass
class Counts:
    """The captures of an attack of an evaluation.

    Attributes:
        replays: number of replays of each capture.
        sizes: sizes of the batches that got gradients.
    """

    replays: list[int] = field(default_factory=list)
    sizes: set[int] = field(default_factory=set)


class _PerAttack(Replays):
    """A stand-in for graphs, which counts for the running attack."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counts] = {}
        self.attack = ""

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Return a function that runs the captured function again, and count its calls.

        Args:
            run: the captured function.
            device: its device.
        """
        counts = self.counts[self.attack]
        number = len(counts.replays)
        # The first replay checks the capture; timed replays do not count either.
        counts.replays.append(-1)

        def replay() -> None:
            counts.replays[number] += 1
            run()

        return replay

    def timed(self, run: Callable[[], None], device: torch.device) -> tuple[float, float]:
        """Report no saving, so that captures learn nothing about their cost.

        Args:
            run: not run.
            device: its device.
        """
        return 1.0, 1.0


class _Noted(StepGraphs):
    """Record the sizes of the batches."""

    def begin(self, function: StepFunction, state: State, steps: int, **options: Any) -> Steps:
        """See `StepGraphs.begin`."""
        capture = self.capture
        assert isinstance(capture, _PerAttack)
        capture.counts[capture.attack].sizes.add(len(state["point"]))
        return super().begin(function, state, steps, **options)


@contextlib.contextmanager
def as_on_a_gpu(capture: _PerAttack) -> Iterator[None]:
    """Within the block, evaluations on the CPU use a GPU's batch sizes, and a stand-in for its graphs.

    Args:
        capture: the stand-in; counts by attack.
    """

    class Noted(measure.Batches):
        def __init__(self, attack: Any, *args: Any, context: Any, **options: Any):
            other = context.gradients_from is not None
            capture.attack = attack.name(context) + (" by the gradients of another model" if other else "")
            capture.counts[capture.attack] = Counts()
            super().__init__(attack, *args, context=context, **options)

    def graphs(mode: CudaGraphs) -> StepGraphs:
        return _Noted(mode, capture=capture)

    runner = importlib.import_module("purify_fast.evaluation.runner")
    with (
        mock.patch.object(rows, "takes_every_size", lambda device: False),
        mock.patch.object(measure, "Batches", Noted),
        mock.patch.object(runner, "StepGraphs", graphs),
        mock.patch.object(Square, "explore", lambda attack, active, objective, run: None),
    ):
        yield


def captured(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Counts]:
    """The captures of each attack of the protocol "standard".

    Args:
        model: images to logits.
        x: images ``[N, C, H, W]`` in [0, 1].
        y: labels, int64 ``[N]``.
        eps: the radius in linf.
    """
    capture = _PerAttack()
    asked: dict[str, Any] = {"protocol": "standard", "batch_size": BATCH, "cuda_graphs": "auto", "progress": False}
    with as_on_a_gpu(capture):
        # A step is one capture whatever the number of draws. With one draw a random model takes a fifth of the time.
        evaluate(model, x, y, eps=eps, eot_iter=1, **asked)
    return capture.counts


#: A run of each attack, by the beginning of its name in a report; no image falls.
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "APGD-10 margin": partial(apgd, loss="margin"),
    "APGD-100 ce": apgd,
    "APGD-T 100 margin": partial(apgd, loss="margin_targeted", n_target_classes=1),
    "APGD-T 100": partial(apgd, loss="dlr_targeted", n_target_classes=1),
    "FAB-T 100": partial(fab_t, n_target_classes=1),
    "Square": lambda *args, steps, **options: square(*args, n_queries=steps, **options),
}


def far_from_falling(model: nn.Module, x: Tensor) -> Tensor:
    """The images whose first logit has the largest lead over the others, in the worst of several draws.

    A random model may misclassify other images in some runs, and their steps would be missing.

    Args:
        model: images to logits.
        x: images ``[N, C, H, W]``.
    """
    with torch.no_grad():
        logits = torch.stack([model(x[:CANDIDATES]) for _ in range(DRAWS)])
    label = logits.mean(0).argmax(1).expand(DRAWS, -1)[..., None]
    margins = logits.gather(2, label)[..., 0] - logits.scatter(2, label, -torch.inf).amax(2)
    return x[margins.amin(0).topk(min(COUNTED_IMAGES, margins.shape[1])).indices]


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


def images_of(name: str, count: int, folder: str) -> tuple[Tensor, Tensor]:
    """The first images of a data set, test images before training images.

    Args:
        name: name of the data set.
        count: largest number of images.
        folder: folder of the data set.
    """
    data = load_dataset(name, folder)
    x, y = (torch.cat([data.x_test, data.x_train]), torch.cat([data.y_test, data.y_train]))
    return to_float(x[:count]), y[:count]


def rows_of(run: Run, count: int, folder: str) -> list[dict[str, Any]]:
    """The rows of an evaluation, one for each attack.

    Args:
        run: the evaluation.
        count: number of images.
        folder: folder of its data.
    """
    model, (x, y) = zoo.load(run.model), images_of(run.data, count, folder)
    some = far_from_falling(model, x)
    with kernels_serve():
        launched = {name: of_model(name, model, some)[0] for name in ATTACKS}
        steps = {
            name: [per_step(model, some, attack, captures) for captures in (False, True)]
            for name, attack in ATTACKS.items()
        }
    rows = []
    for attack, counts in captured(model, x, y, run.eps).items():
        replays, name = counts.replays, next(name for name in ATTACKS if attack.startswith(name))
        (eager, waits), (graph, _) = steps[name]
        rows.append(
            {
                "model": run.model,
                "eps": f"{run.eps:.4g}",
                "images": len(x),
                "attack": attack,
                "captures": len(replays),
                "replays": sum(replays),
                "replays_per_capture": round(sum(replays) / len(replays)) if replays else "",
                "least_replays": min(replays, default=""),
                "batch_sizes": len(counts.sizes) or "",
                "model_launches": launched[name],
                "launches_eager": round(eager, 1),
                "launches_captured": round(graph, 1),
                "waits_per_100_steps": round(100 * waits),
            }
        )
    return rows


def write(results: Path, count: int = IMAGES, folder: str = "data", redo: bool = False) -> Path:
    """Count, and write ``captures.csv`` into the folder of results after each evaluation; resume earlier runs.

    Args:
        results: the folder.
        count: number of images of an evaluation.
        folder: folder of the data.
        redo: whether to count again the evaluations that are in the file.
    """
    path = results / FILE
    rows: list[dict[str, Any]] = [] if redo or not path.exists() else list(report.read_csv(path))
    for run in tqdm(RUNS, desc="captures", unit=" evaluations"):
        if any((row["model"], row["eps"]) == (run.model, f"{run.eps:.4g}") for row in rows):
            continue
        rows += rows_of(run, count, folder)
        report.write_csv(path, rows)
    return path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks captures``."""
    parser.add_argument(
        "--images", type=options.at_least_one, default=IMAGES, help="of each evaluation; 1000 by default"
    )
    parser.add_argument("--data", default="data", help="folder with cifar10.npz or the official files")
    parser.add_argument("--redo", action="store_true", help="also what is counted already")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")


def main(chosen: argparse.Namespace) -> Path:
    """``python -m benchmarks captures``."""
    return write(chosen.out, chosen.images, chosen.data, chosen.redo)


def chapter(results: Path) -> list[str]:
    """The lines of docs/performance.md on the results of `write`, if there are any.

    Args:
        results: the folder.
    """
    if not (results / FILE).exists():
        return []
    body = []
    for row in report.read_csv(results / FILE):
        cells = [row[name] for name in ("model", "eps", "attack", "captures", "replays")]
        cells += [row["replays_per_capture"] or "-", row["least_replays"] or "-", row["batch_sizes"] or "-"]
        shown = ("model_launches", "launches_eager", "launches_captured", "waits_per_100_steps")
        body.append([*cells, *(row[name] for name in shown)])
    heads = ["model", "eps", "attack", "captures", "replays", "per capture", "least used"]
    heads += ["batch sizes", "operators of a step: of the model", "launched", "beside a graph", "waits in 100 steps"]
    return [
        "## What an evaluation captures",
        "",
        "Counted, not measured: `python -m benchmarks captures` runs `evaluate` with the protocol `standard` on a CPU, "
        f"{IMAGES:,} images in batches of {BATCH}, with a GPU's batch sizes and functions that stand for CUDA graphs. "
        f"A capture is taken to cost as much as {WORTH} steps, an estimate for a ResNet-18; on a GPU every capture "
        "measures that cost anew. A step is captured once the steps that are to be expected, going by earlier runs and "
        "the batches to come, pay for two captures. Square has no step that is captured, and its queries were not "
        "counted. Operators are those of one step where kernels serve, the model's own included: its gradient and "
        "loss, for Square its forward pass.",
        "",
        *report.table(heads, body),
    ]
