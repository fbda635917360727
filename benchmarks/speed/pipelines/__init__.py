"""The pipelines' benchmarks, a file each: what users run end to end, against a plain implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from purify_fast.training import Batch, Task


@dataclass(frozen=True)
class Job:
    """A contestant, ready to run in its own process.

    Attributes:
        run: the timed function.
        result: returns numbers that must agree with those of the first contestant.
        parts: parts of ``run`` by name, which are timed separately.
        times: how often ``run`` does the work that other contestants do once.
    """

    run: Callable[[], object]
    result: Callable[[], Tensor]
    parts: dict[str, Callable[[], object]] = field(default_factory=dict)
    times: int = 1


#: Makes a job for a device, small for a quick run.
Make = Callable[[torch.device, bool], Job]


@dataclass(frozen=True)
class Contestant:
    """A column of a case.

    Attributes:
        make: makes its job.
        raised: whether glibc's allocator thresholds are raised.
        tf32: whether a GPU rounds the operands of its float32 products to ten bits; by default float32 is IEEE's, as
            this package's own evaluation and training have it.
        less_work: whether it computes other things than ours, so that the FLOP of ours do not apply.
        compared: whether its result must agree with the first contestant's; otherwise only its time and memory count.
    """

    make: Make
    raised: bool
    tf32: bool = False
    less_work: bool = False
    compared: bool = True


@dataclass(frozen=True)
class Case:
    """A row of the table. The first contestant is the standard of comparison; ``ours`` counts the work.

    Attributes:
        tolerance: relative L2 distance to the first contestant's result.
        flops: FLOP of ours, in symbols that `performance` explains.
    """

    shape: str
    tolerance: float
    contestants: dict[str, Contestant]
    flops: str


def autocast(make: Make, device: torch.device, quick: bool) -> Job:
    """The same job under `torch.autocast` to bfloat16."""
    job, cast = make(device, quick), torch.autocast(device.type, torch.bfloat16)
    return Job(cast(job.run), cast(job.result), times=job.times)


def _made(make: Make, device: torch.device, quick: bool) -> Job:
    """Make the job; in a quick run `torch.compile` does nothing, since it would take most of the time."""
    job = make(device, quick)
    if not quick:
        return job
    eager = torch.compiler.set_stance("force_eager")
    return Job(eager(job.run), eager(job.result), job.parts, job.times)


def columns(plain: Callable[..., Job], ours: Callable[..., Job], captured: bool = True) -> dict[str, Contestant]:
    """The columns of a pipeline. Ours computes in bfloat16; the plain forms in float32 and in bfloat16.

    Only a machine with a GPU can race the plain form in TF32, which is PyTorch's own default for convolutions, and ours
    with its attack's step in a CUDA graph.

    Args:
        plain: makes a job for a device, quick or not; compiled if it gets the keyword ``compiled``.
        ours: like ``plain``; with its attack's step captured if it gets the keyword ``captured``.
        captured: whether ours has that keyword.
    """

    def of(make: Callable[..., Job], **options: bool) -> Make:
        return partial(_made, partial(make, **options))

    compiled, gpu = of(plain, compiled=True), torch.cuda.is_available()
    return {
        "plain": Contestant(of(plain), False),
        "plain, allocator raised": Contestant(of(plain), True),
        **({"plain, TF32": Contestant(of(plain), True, tf32=True)} if gpu else {}),
        "plain, bfloat16": Contestant(partial(autocast, of(plain)), True),
        "torch.compile of plain": Contestant(compiled, True),
        "torch.compile of plain, bfloat16": Contestant(partial(autocast, compiled), True),
        "ours": Contestant(of(ours), True),
        "ours, compiled": Contestant(of(ours, compiled=True), True),
        **({"ours, captured": Contestant(of(ours, captured=True), True)} if gpu and captured else {}),
    }


def random_batch(device: torch.device, size: int, side: int, epochs: int) -> Batch:
    """The same random images and labels in every call."""
    source = torch.Generator().manual_seed(1)
    x, y = torch.rand(size, 3, side, side, generator=source), torch.randint(10, (size,), generator=source)
    return Batch(x.to(device), y.to(device), torch.arange(size, device=device), 7, 5, epochs)


def optimizer_step(task: Task, batch: Batch) -> Tensor:
    """Make a step of a training with the first optimizer; return the loss."""
    loss, optimizer = task.training_step(batch)[0], next(iter(task.optimizers.values()))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def registry() -> dict[str, Callable[[bool], dict[str, Case]]]:
    """Pipelines by name; each makes its cases by name, small cases for a quick run."""
    from . import arrest_step, atop_finetune, carso_inference, carso_training, diffusion

    modules = (carso_inference, carso_training, atop_finetune, arrest_step, diffusion)
    return {module.__name__.rpartition(".")[2]: module.cases for module in modules}
