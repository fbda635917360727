"""Count the operators that a step of each training dispatches. On a GPU each operator is a launch, which takes time.

The operators are counted on the CPU, as PyTorch dispatches them. Operators that move no data, such as views, are left
out. There are four counts for each training:

- ``references``: every op runs its reference in PyTorch.
- ``by rule``: an op runs its kernel if a GPU would use this kernel in eager calls before any measurement. The rule is
  that the kernel replaces at least a dozen launches.
- ``by rule, captured``: kernels as in ``by rule``, and each step of the attack is a replay of a CUDA graph. A replay is
  one launch.
- ``all kernels``: every op runs its kernel, as if all kernels had been measured to be faster.

A CPU kernel stands for a GPU kernel, because both are a single operator. CARSO's decoder has no CPU kernel, so the
operators of its layers are counted.
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
#: The module of contextual attention. It is imported by its full name, because `purify_fast.ops` has a function with
#: the module's name.
attention = import_module("purify_fast.ops.contextual_attention")


def _batch() -> Batch:
    x = torch.rand((16, *SHAPE), generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(16) % 10, torch.arange(16), 7, 0, 10)


def _arrest(steps: int) -> ArrestTask:
    attack = TrainingAttack(eps=EPS, steps=steps, alpha=EPS / min(4, steps))
    return ArrestTask(SmallCNN(width=4), ArrestConfig(attack=attack), SHAPE)


def _carso(target: str, steps: int) -> CarsoTask:
    made = Carso(SmallCNN(width=4), ["conv2", "hidden"], SHAPE, 8, 4, 2, decoder_width=2)
    return CarsoTask(made, CarsoConfig(attack_target=target, attack=TrainingAttack(eps=EPS, steps=steps)))


def _atop(target: str, steps: int) -> AtopTask:
    defence = Atop(SmallCNN(width=4), SmallGenerator(1, width=2), SHAPE, block=4, sigma=0.1)
    attack, method = TrainingAttack(eps=EPS, steps=steps), "fgsm" if target == "classifier" else "pgd"
    return AtopTask(defence, AtopConfig(attack_method=method, attack_target=target, attack=attack, cls_delay=0))


#: For each training, the function that makes its task. PGD-N is PGD with N steps.
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
    """Within the block, choose for each op on the CPU between its reference and its kernel.

    Args:
        by: name of the rule. "references" chooses no kernel, and "all kernels" every kernel. "by rule" and "by rule,
            captured" choose the kernels that a GPU would use before any measurement.
    """
    entries = {}
    for name, op in REGISTRY.items():
        rule = op.serves_unraced("eager")
        kernels = {"references": (), "by rule": rule, "by rule, captured": rule, "all kernels": ("",)}[by]
        cells = {"": {"eager": "reference"}} | {variant: {"eager": op.kernel("cpu")} for variant in kernels}
        entries[name] = {"races": [cells]}
    # Turn off the CPU kernel of the whole attention. A GPU has no such kernel, so a GPU launches more operators.
    whole, attention.WHOLE = attention.WHOLE, False
    try:
        with keep_kernels({"device": "cpu", "ops": entries}):
            yield
    finally:
        attention.WHOLE = whole


class Replays:
    """Replaces CUDA graphs in `StepGraphs` on a CPU. A replay runs the step again, and counts as a single launch."""

    kind = "cpu"

    def __init__(self) -> None:
        self.replayed = 0

    def aside(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Return an empty context, because nothing disturbs the capture on a CPU."""
        return contextlib.nullcontext()

    def clock(self) -> float:
        """Return a constant, because times do not matter here."""
        return 0.0

    def timed(self, run: Callable[[], None], device: torch.device) -> tuple[float, float]:
        """Run a step, and return constants for the launch time and the time of the whole step."""
        run()
        return 1.0, 1.0

    def now(self, device: torch.device) -> float:
        """Return a constant, because times do not matter here."""
        return 0.0

    def release(self) -> None:
        """Do nothing, because a CPU needs no memory for graphs."""

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Return a function that replays a step, and counts the replay in place of the step's operators."""

        def replay() -> None:
            self.replayed += 1
            with _disable_current_modes():
                run()

        return replay


def count(make: Callable[[], Any], by: Served) -> int:
    """Count the operators of a training step, forward and backward, without the extra work of the first steps.

    Args:
        make: function that makes the task of the training.
        by: rule that chooses between references and kernels, as in `served`.
    """
    torch.manual_seed(0)
    with served(by):
        task, batch, replays = make(), _batch(), Replays()
        task.graphs = StepGraphs("always", capture=replays) if by == "by rule, captured" else None
        task.model.train()
        # Count only the third step: the first steps also capture the graph, and check the first replay.
        for _ in range(3):
            torch.manual_seed(0)
            replays.replayed = 0
            with Launches() as launches:
                task.training_step(batch)[0].backward()
    return launches.count + replays.replayed


def write(results: Path) -> Path:
    """Count the operators, and write ``launches.csv`` into the folder of results. Return the path of the file."""
    path = results / FILE
    rows = [{"training": name, **{by: count(make, by) for by in get_args(Served)}} for name, make in TRAININGS.items()]
    sheets.write_csv(path, rows)
    return path


def table(results: Path) -> list[str]:
    """Return the table with the committed numbers of operators in a step of each training."""
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
