"""Model the time of one step of each attack on an H100. The numbers are counted, not measured.

A step takes at least the longest of three times: the host's time to launch the operators, the time to move their bytes,
and the time of the matrix products in the tensor cores. Launches, bytes and FLOP are counted on the CPU at two batch
sizes, as PyTorch dispatches a step. They are extrapolated linearly to other batch sizes. Measurements on a GPU can
later test the model.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from purify_fast.attacks import apgd, fab_t, square
from purify_fast.attacks.attacked_model import frozen
from purify_fast.attacks.objective import Objective
from purify_fast.models import PreActResNet18
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops.dispatch import registry
from purify_fast.ops.dispatch.racing import Launches
from purify_fast.speed.counting import EAGER, GPUS, REPLAYED, SHARE, Cost, counted
from purify_fast.speed.folding.batchnorm import fold_batchnorm
from purify_fast.speed.graphs.host_syncs import HostSyncs
from purify_fast.speed.graphs.step_graphs import StepGraphs

from .. import RESULTS
from ..speed import sheets
from .launches import Replays, served

FILE = "roofline.csv"
H100 = GPUS["h100"]
#: COUNTED are the batch sizes at which a step is counted, and BATCHES those for which its time is modelled.
COUNTED, BATCHES = (4, 8), (16, 64, 250)
#: The lengths of two runs of an attack. Their difference gives the work of a single step.
COUNTED_STEPS = (20, 40)
SHAPE, CLASSES, EPS = (3, 32, 32), 10, 8 / 255
#: The function that runs each modelled attack, by the beginning of the attack's name in a report.
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "APGD-100 ce": apgd,
    "APGD-T 100": partial(apgd, loss="dlr_targeted", n_target_classes=1),
    "FAB-T 100": partial(fab_t, n_target_classes=1),
    "Square": lambda *args, steps, **options: square(*args, n_queries=steps, **options),
}


class Half(nn.Module):
    """A classifier as attacks use it for gradients on a GPU: with folded BatchNorm, in bfloat16 and channels_last.

    Args:
        model: classifier, which is changed.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        fold_batchnorm(model.eval(), torch.rand(1, *SHAPE))
        self.inner = model.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(torch.bfloat16, memory_format=torch.channels_last)).float()


def per_step(model: nn.Module, x: Tensor, attack: Callable[..., Tensor], captures: bool) -> tuple[float, float]:
    """Count the launches of one step of an attack, and the operators that wait for the device.

    The labels are the model's own predictions and eps is tiny, so that no image becomes adversarial.

    Args:
        model: classifier, images to logits.
        x: images ``[B, C, H, W]``.
        attack: one of `ATTACKS`.
        captures: True to run every step that can be captured as the replay of a CUDA graph.
    """
    y, replays = model(x).argmax(1).detach(), Replays()
    options: dict[str, Any] = {"eps": 1e-6}
    if captures and attack is not ATTACKS["Square"]:
        options["graphs"] = StepGraphs("always", capture=replays)
    launched, waited = [], []
    for steps in COUNTED_STEPS:
        # Run the attack once before the counted run, because the first run captures the graphs.
        attack(model, x, y, steps=steps, **options)
        replays.replayed = 0
        with HostSyncs() as waits, Launches() as launches:
            attack(model, x, y, steps=steps, **options)
        launched.append(launches.count + replays.replayed)
        waited.append(sum(waits.counts.values()))
    steps = COUNTED_STEPS[1] - COUNTED_STEPS[0]
    return (launched[1] - launched[0]) / steps, (waited[1] - waited[0]) / steps


def of_model(name: str, model: nn.Module, x: Tensor) -> Cost:
    """Count a model's work in one step of an attack: the gradient of a loss, or a forward pass for Square.

    Args:
        name: name of the attack in `ATTACKS`.
        model: classifier, images to logits.
        x: images ``[B, C, H, W]``.
    """
    with frozen(model), torch.no_grad():
        labels = model(x).topk(2, 1).indices
        if name == "Square":
            return counted(lambda: model(x))
        return counted(lambda: Objective(model, "margin_targeted").gradient(x, labels))


def kernels_serve() -> contextlib.AbstractContextManager[Any]:
    """Within the block, every op counts as one operator, as its kernel on a GPU would, even if a CPU has no kernel."""
    return mock.patch.object(registry.Op, "uses_reference", lambda *given: False)


def of_attack(name: str, size: int) -> tuple[Cost, float]:
    """Count the work of one step of an attack on a ResNet-18, and its launches with CUDA graphs.

    The work of the attack itself is counted on a tiny network. Then the work of this network is subtracted, and that of
    the ResNet-18 is added. No image becomes adversarial.

    Args:
        name: name of the attack in `ATTACKS`.
        size: number of images.
    """
    torch.manual_seed(0)
    x, attack = torch.rand(size, *SHAPE), ATTACKS[name]
    tiny = SmallCNN(SHAPE[0], CLASSES, SHAPE[1:], 4).eval()
    large = Half(PreActResNet18(num_classes=CLASSES))
    y = tiny(x).argmax(1)
    with kernels_serve():
        captured, _ = per_step(tiny, x, attack, True)
        short, long = (
            counted(lambda steps=steps: attack(tiny, x, y, steps=steps, eps=1e-6)) for steps in COUNTED_STEPS
        )
        small, big = of_model(name, tiny, x), of_model(name, large, x)
    step = long.plus(short.times(-1)).times(1 / (COUNTED_STEPS[1] - COUNTED_STEPS[0]))
    cost = step.plus(small.times(-1)).plus(big)
    # Square's queries are not captured, so CUDA graphs do not change its launches.
    return cost, cost.launches if name == "Square" else captured


def row_of(step: str, cost: Cost, captured: float, size: int) -> dict[str, Any]:
    """Return a row of the results file: the modelled times of one step.

    Args:
        step: name of the attack.
        cost: work of the step.
        captured: number of launches with CUDA graphs, where each replay counts as one launch.
        size: number of images.
    """
    eager = {
        "launches": cost.launches * EAGER,
        "bytes": cost.bytes / H100.bytes_per_second,
        "products": cost.flop / (SHARE * H100.bfloat16),
    }
    replaying = max(captured * EAGER, (cost.launches - captured) * REPLAYED)
    replayed = {**eager, "launches": replaying}
    return {
        "step": step,
        "images": size,
        "launches": round(cost.launches),
        "launches_captured": round(captured),
        "MB": round(cost.bytes / 1e6, 1),
        "GFLOP": round(cost.flop / 1e9, 2),
        **{f"{name}_ms": f"{1e3 * value:.3g}" for name, value in eager.items()},
        "launches_captured_ms": f"{1e3 * replaying:.3g}",
        "eager_ms": f"{1e3 * max(eager.values()):.3g}",
        "eager_bound": max(eager, key=eager.__getitem__),
        "captured_ms": f"{1e3 * max(replayed.values()):.3g}",
        "captured_bound": max(replayed, key=replayed.__getitem__),
    }


def write(results: Path) -> Path:
    """Count the work of all attacks, and write ``roofline.csv``. Return the path of the file.

    Bytes and FLOP for other batch sizes lie on the straight line through the two counted batch sizes.

    Args:
        results: folder of results.
    """
    rows = []
    with served("by rule"):
        for name in tqdm(ATTACKS, desc="roofline", unit=" steps"):
            (small, _), (large, captured) = (of_attack(name, size) for size in COUNTED)
            for size in BATCHES:
                share = (size - COUNTED[0]) / (COUNTED[1] - COUNTED[0])
                rows.append(row_of(name, small.line(large, share), captured, size))
    path = results / FILE
    sheets.write_csv(path, rows)
    return path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks roofline``."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results; default: benchmarks/results")


def main(chosen: argparse.Namespace) -> Path:
    """Run ``python -m benchmarks roofline``."""
    return write(chosen.out)


#: The headings of the table, in the order of the columns in the results file.
HEADS = ["step", "images", "operators", "beside a graph", "MB", "GFLOP", "launches, ms", "bytes, ms", "products, ms"]
HEADS += ["captured launches, ms", "eager, ms", "bound by", "captured, ms", "bound by"]


def table(results: Path) -> list[str]:
    """Return the table of the modelled times for docs/performance.md."""
    return sheets.table(HEADS, [row.values() for row in sheets.read_csv(results / FILE)])
