"""The operators that a step of each training dispatches: on a GPU each is a launch, which costs host time.

PyTorch's dispatches are counted on the CPU, without operators that move no data, such as views. The ops are served by
the PyTorch references; by the kernels that serve a GPU's eager calls without races, which replace at least a dozen
launches each, with the attack's step launched each time or replayed as one graph; and by every kernel, as if all had
won their races. The CPU's kernels stand for the GPU's, as both are one operator; the decoder, which has no CPU kernel,
is counted by its layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils._python_dispatch import _disable_current_modes

from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import REGISTRY, keep_kernels
from purify_fast.ops.dispatch.racing import Launches
from purify_fast.speed.graphs.step_graphs import StepGraphs
from purify_fast.training import Batch
from purify_fast.training.config import TrainingAttack

from ..speed import sheets

FILE = "launches.csv"
SHAPE, EPS = (1, 16, 16), 0.1
Served = Literal["references", "by rule", "by rule, captured", "all kernels"]
CPU = torch.device("cpu")
#: The module, which the package's function of the same name hides.
attention = import_module("purify_fast.ops.contextual_attention")


def _batch() -> Batch:
    x = torch.rand((16, *SHAPE), generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(16) % 10, torch.arange(16), 7, 0, 10)


def _small() -> SmallCNN:
    return SmallCNN(width=4)


def _arrest(steps: int) -> ArrestTask:
    attack = TrainingAttack(eps=EPS, steps=steps, alpha=EPS / min(4, steps))
    return ArrestTask(_small(), ArrestConfig(attack=attack), SHAPE)


def _carso(target: str, steps: int) -> CarsoTask:
    made = Carso(_small(), ["conv2", "hidden"], SHAPE, 8, 4, 2, decoder_width=2)
    return CarsoTask(made, CarsoConfig(attack_target=target, attack=TrainingAttack(eps=EPS, steps=steps)))


def _atop(target: str, steps: int) -> AtopTask:
    defence = Atop(_small(), SmallGenerator(1, width=2), SHAPE, block=4, sigma=0.1)
    attack, method = TrainingAttack(eps=EPS, steps=steps), "fgsm" if target == "classifier" else "pgd"
    return AtopTask(defence, AtopConfig(attack_method=method, attack_target=target, attack=attack, cls_delay=0))


#: For each training, the function that makes its task, with the number of its attack's steps; FGSM has none.
TRAININGS: dict[str, Callable[[], Any]] = {
    "ARREST, PGD-2": partial(_arrest, 2),
    "ARREST, PGD-10": partial(_arrest, 10),
    "CARSO, paper's objective, PGD-2": partial(_carso, "classifier", 2),
    "CARSO, paper's objective, PGD-10": partial(_carso, "classifier", 10),
    "CARSO, pipeline, PGD-2": partial(_carso, "pipeline", 2),
    "CARSO, pipeline, PGD-10": partial(_carso, "pipeline", 10),
    "AToP, paper's objective, FGSM": partial(_atop, "classifier", 10),
    "AToP, pipeline, PGD-2": partial(_atop, "pipeline", 2),
    "AToP, pipeline, PGD-10": partial(_atop, "pipeline", 10),
}


@contextlib.contextmanager
def served(by: Served) -> Iterator[None]:
    """Within the block, the CPU is served by the references alone, as a GPU where nothing was raced, or by all kernels.

    Args:
        by: references or kernels.
    """
    entries = {}
    for name, op in REGISTRY.items():
        rule = op.serves_unraced("eager")
        kernels = {"references": (), "by rule": rule, "by rule, captured": rule, "all kernels": ("",)}[by]
        cells = {"": {"eager": "reference"}} | {variant: {"eager": op.kernel("cpu")} for variant in kernels}
        entries[name] = {"races": [cells]}
    # A CPU has kernels for whole functions that a GPU lacks: they would count fewer operators than a GPU launches.
    whole, attention.WHOLE = attention.WHOLE, False
    try:
        with keep_kernels({"device": "cpu", "ops": entries}):
            yield
    finally:
        attention.WHOLE = whole


class Replays:
    """Stands for CUDA graphs on a CPU, for `StepGraphs`: a replay runs the captured step again, as one launch."""

    kind = "cpu"

    def __init__(self) -> None:
        self.replayed = 0

    def aside(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Do nothing: nothing here disturbs the step."""
        return contextlib.nullcontext()

    def clock(self) -> float:
        """Return a constant: no time passes."""
        return 0.0

    def timed(self, run: Callable[[], None], device: torch.device) -> tuple[float, float]:
        """Report that all of a step's time is launching."""
        run()
        return 1.0, 1.0

    def now(self, device: torch.device) -> float:
        """Return a constant: no time passes."""
        return 0.0

    def release(self) -> None:
        """Do nothing: there is no memory to give back."""

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Return a function that replays a step without counting its operators."""

        def replay() -> None:
            self.replayed += 1
            with _disable_current_modes():
                run()

        return replay


def count(make: Callable[[], Any], by: Served) -> int:
    """Count the operators of a step, forward and backward, after everything that is made only once.

    Args:
        make: makes the training's task.
        by: see `served`.
    """
    torch.manual_seed(0)
    with served(by):
        task, batch, replays = make(), _batch(), Replays()
        task.graphs = StepGraphs("always", capture=replays) if by == "by rule, captured" else None
        task.model.train()
        # The first replay is checked by an eager step.
        for _ in range(3):
            torch.manual_seed(0)
            replays.replayed = 0
            with Launches() as launches:
                task.training_step(batch)[0].backward()
    return launches.count + replays.replayed


def measured() -> list[dict[str, Any]]:
    """A row for each training."""
    return [{"training": name, **{by: count(make, by) for by in get_args(Served)}} for name, make in TRAININGS.items()]


def write(results: Path) -> Path:
    """Count, and write ``launches.csv`` into the folder of results."""
    path = results / FILE
    sheets.write_csv(path, measured())
    return path


def table(results: Path) -> list[str]:
    """The operators of one step of each training, from the committed count."""
    body = []
    for row in sheets.read_csv(results / FILE):
        plain = int(row["references"])
        cells = [row["training"], f"{plain:,}"]
        for name in ("by rule", "by rule, captured", "all kernels"):
            cells += [f"{int(row[name]):,}", f"{plain / int(row[name]):.1f}"]
        body.append(cells)
    fewer = "times fewer"
    return sheets.table(
        ["training", "references", "kernels by rule", fewer, "captured", fewer, "all kernels", fewer], body
    )
