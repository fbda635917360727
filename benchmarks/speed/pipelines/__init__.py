"""Measure pipelines: whole computations, such as a prediction or a training step. Each pipeline has a module.

A case of a pipeline compares several implementations of the same work, which are called contestants. "Ours" is the
implementation by this package. "Plain" is an implementation in plain PyTorch, as its introductions teach it. "Expert"
is the fastest implementation that a practitioner writes with PyTorch's public functions (see `expert`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from purify_fast.speed import StepGraphs
from purify_fast.speed.precision import float32_products, raced_convolutions
from purify_fast.training import Batch, Task
from purify_fast.training.loop import train_step
from purify_fast.training.optimizers import fuse

from .expert import DTYPES, autocast as faster_autocast

#: The beginning of the names of the expert's forms.
EXPERT = "expert"


@dataclass(frozen=True)
class Job:
    """The work of a contestant, ready to run in the contestant's process.

    Attributes:
        run: function that is timed.
        result: function that returns numbers, which must agree with those of the first contestant.
    """

    run: Callable[[], object]
    result: Callable[[], Tensor]


#: A function that makes a job for a device. Its second argument is True for a quick run, whose job is small.
Make = Callable[[torch.device, bool], Job]


@dataclass(frozen=True)
class Contestant:
    """A compared implementation of a case.

    Attributes:
        make: function that makes the contestant's job.
        raised: True to raise the thresholds of glibc's memory allocator, so that the allocator keeps freed memory.
        tf32: True to let a GPU round the operands of float32 products to ten bits of mantissa. False computes in IEEE
            float32, as evaluations and trainings of this package do.
        raced: True to let cuDNN time its convolutions on a GPU, and use the fastest.
    """

    make: Make
    raised: bool
    tf32: bool = False
    raced: bool = False

    @contextlib.contextmanager
    def settings(self, device: torch.device) -> Iterator[None]:
        """Give the process the settings of the contestant on a device within the block."""
        with float32_products(tf32=self.tf32), raced_convolutions("on" if self.raced else "off", device):
            yield


@dataclass(frozen=True)
class Case:
    """The contestants on one input. Their results and speeds are compared with those of the first contestant.

    Attributes:
        shape: description of the input, for the tables.
        tolerance: largest allowed relative L2 distance between the results of a contestant and of the first contestant.
        contestants: compared implementations, by name.
    """

    shape: str
    tolerance: float
    contestants: dict[str, Contestant]


def precision(device: torch.device) -> str:
    """Return the precision of trainings on a device, in which the expert trains too."""
    return str(DTYPES[device.type]).removeprefix("torch.")


def autocast(make: Make, device: torch.device, quick: bool) -> Job:
    """Make a job that runs under `torch.autocast` to bfloat16, if that is faster on the device."""
    job, cast = make(device, quick), faster_autocast(device)
    return Job(cast(job.run), cast(job.result))


def made(make: Make, device: torch.device, quick: bool) -> Job:
    """Make a job. In a quick run `torch.compile` is switched off, because compilation would take most of the time."""
    if not quick:
        return make(device, quick)
    eager = torch.compiler.set_stance("force_eager")
    # A compiled frozen copy is called when it is made, because it is compared with its model.
    job = eager(make)(device, quick)
    return Job(eager(job.run), eager(job.result))


def columns(
    plain: Callable[..., Job], expert: Callable[..., Job], ours: Callable[..., Job], captured: bool = True
) -> dict[str, Contestant]:
    """Return the usual contestants: plain, the expert and ours, each also compiled.

    On a machine with a GPU there are further contestants: plain in TF32, which is PyTorch's default for convolutions,
    and ours with attack steps that are captured as CUDA graphs, also compiled, if ``ours`` accepts the keyword
    ``captured``.
    """

    def of(make: Callable[..., Job], **options: bool) -> Make:
        return partial(made, partial(make, **options))

    gpu = torch.cuda.is_available()
    own = {"ours": {}, "ours, compiled": {"compiled": True}}
    if gpu and captured:
        own["ours, captured"] = {"captured": True}
        own["ours, compiled and captured"] = {"compiled": True, "captured": True}
    return {
        "plain": Contestant(of(plain), False),
        **({"plain, TF32": Contestant(of(plain), True, tf32=True)} if gpu else {}),
        "torch.compile of plain": Contestant(partial(autocast, of(plain, compiled=True)), True),
        EXPERT: Contestant(of(expert), True, tf32=True, raced=True),
        f"{EXPERT}, compiled": Contestant(of(expert, compiled=True), True, tf32=True, raced=True),
        **{name: Contestant(of(ours, **how), True, raced=True) for name, how in own.items()},
    }


def random_batch(device: torch.device, size: int, side: int, epochs: int) -> Batch:
    """Return a batch of random images and labels, which are the same in every call."""
    source = torch.Generator().manual_seed(1)
    x, y = torch.rand(size, 3, side, side, generator=source), torch.randint(10, (size,), generator=source)
    return Batch(x.to(device), y.to(device), torch.arange(size, device=device), 7, 5, epochs)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Move the weights by the gradient of a loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def training_step(task: Task, batch: Batch, compiled: bool, captured: bool) -> Callable[[], Tensor]:
    """Return a function that does one training step as `fit` does it on this device, and returns the loss.

    If it is ``captured``, the steps of its attack are replays of CUDA graphs. Compiled steps have graphs of their own.
    """
    task.compiles = compiled
    task.begin()
    task.graphs = StepGraphs("always") if captured and not compiled else None
    for optimizer in task.optimizers.values():
        fuse(optimizer, batch.x.device.type == "cuda")

    def step() -> Tensor:
        loss = train_step(task, batch)["loss"]
        # A row must not be called captured if the steps of its attack were refused.
        if task.graphs is not None and (task.graphs.refusals or not task.graphs.captures):
            raise RuntimeError("the attack of the training step was not captured as a CUDA graph")
        return loss

    return step


def registry() -> dict[str, Callable[[bool], dict[str, Case]]]:
    """Return, for each pipeline, a function that makes its cases. Its argument is True for the cases of a quick run."""
    from . import arrest_step, atop_finetune, carso_inference, carso_training, diffusion, pgd_forms

    modules = (carso_inference, carso_training, atop_finetune, arrest_step, diffusion, pgd_forms)
    return {module.__name__.rpartition(".")[2]: module.cases for module in modules}
