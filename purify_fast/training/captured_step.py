"""Capture whole training steps as CUDA graphs: the attack, the forward pass, the loss and the gradients.

The optimizer's step is not captured: fused optimizers launch few kernels, and so learning rates, the mean of gradients
and moving averages need no form of their own. Replays read the images, labels, ids and the seed from fixed memory.
"""

from __future__ import annotations

import itertools
import random
import time
import weakref
from collections import UserDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._compiler import section
from .._validation import in_one_line
from ..model_description import identity_key
from ..ops.philox import philox_key
from ..speed.graphs.cuda_capture import CudaCapture
from ..speed.graphs.step_graphs import InlineSteps, StepGraphs, alike, leave_no_trace, remember, run_trial
from ..speed.graphs.step_loop import CAPTURE_STEPS, RETRIED_AFTER, numerics, reserved, weak_key
from .distributed import exchanges
from .optimizers import weights_of
from .task import Batch, Metrics, Task

#: A function that computes the gradients of each update of a step, and yields the optimizer's name and the metrics.
Gradients = Callable[[Task, Batch], Iterator[tuple[str, Metrics]]]
#: The largest number of kinds of steps that are remembered. Their graphs share memory.
MOST_STEPS = 2
#: The number of times that a step is run without a graph, to compare its replay with the results.
REPEATS = 4
#: A result is mostly rounding if repeats differ by more than this share of its norm.
MOSTLY_NOISE = 0.1
#: The first replay is compared with other weights than those of the capture, because a graph might use stale copies of
#: weights: all weights are multiplied by this number.
OTHER_WEIGHTS = 1.1


@dataclass
class _Update:
    """A captured update: its optimizer, its metrics in fixed memory, the gradients that a replay writes, the replay."""

    optimizer: str
    names: list[str]
    values: Tensor
    gradients: list[tuple[Tensor, Tensor | None]]
    replay: Callable[[], None]


class CapturedStep:
    """A captured training step for one shape of batches. It shares the memory of ``graphs``.

    The capture restores weights, buffers, gradients and random generators. It raises a RuntimeError if the step cannot
    be captured, or if a replay gives other results. The addresses of ``objects`` are in the step's key, so they must
    stay alive.
    """

    def __init__(self, task: Task, batch: Batch, gradients: Gradients, graphs: StepGraphs, objects: list[Any]):
        device, self.objects = batch.x.device, objects
        x, y, ids = (part.clone() for part in (batch.x, batch.y, batch.sample_ids))
        self.numbers = batch.numbers
        numbers = _Read({name: torch.full((), float(value), device=device) for name, value in batch.numbers.items()})
        self.given = replace(batch, x=x, y=y, sample_ids=ids, seed=philox_key(batch.seed, device), numbers=numbers)
        self.updates: list[_Update] = []
        with leave_no_trace(device):
            # The step itself comes first, because the graph keeps the memory of a whole step. Its first call may still
            # verify kernels and choose algorithms, so it is not compared. It computes the numbers of `Task.numbers`
            # itself, because a second attack in a step might take those of the first.
            def directly(given: Batch) -> Iterator[tuple[str, Metrics]]:
                return gradients(task, replace(given, numbers={}))

            _, *repeats = (self._results(task, directly) for _ in range(1 + REPEATS))
            with undone(task, device):
                self._record(task, gradients, graphs.capture)
            if unread := sorted(numbers.keys() - numbers.read):
                raise RuntimeError(f"the step does not read {', '.join(unread)} of batch.numbers: see Task.numbers")
            got = self._results(task, self.run)
        if not within_repeats(got, repeats):
            raise RuntimeError("a replay gives another result than the step")

    def _record(self, task: Task, gradients: Gradients, capture: CudaCapture) -> None:
        device = self.given.x.device
        with capture.aside(device), inline(task):
            # The first call verifies kernels and chooses algorithms, and may wait for the device.
            list(gradients(task, self.given))
            known, given = run_trial(lambda: list(gradients(task, self.given)), device)
        # The attacked copy may get other tensors later, and the graph writes to these.
        self.objects += given
        # A copy of the weights is made again only if their version has changed, and the graph must make it.
        change_weights(task, 1.0)
        running: Iterator[tuple[str, Metrics]] = iter(())
        for number, (name, metrics) in enumerate(known):
            values = torch.zeros(len(metrics), device=device)

            def advance(number: int = number, values: Tensor = values) -> None:
                nonlocal running
                if number == 0:
                    running = gradients(task, self.given)
                with inline(task):
                    metrics = next(running)[1]
                values.copy_(torch.stack([metric.float() for metric in metrics.values()]))

            replay = capture.record(advance, device)
            written = [(weight, weight.grad) for weight in weights_of(task.optimizers[name])]
            self.updates.append(_Update(name, list(metrics), values, written, replay))
        # The graph also writes to the gradients of weights that no optimizer changes.
        self.objects += [weight.grad for weight in task.model.parameters()]

    def _results(self, task: Task, run: Callable[[Batch], Iterator[tuple[str, Metrics]]]) -> list[Tensor]:
        """The metrics and the gradients of a step with other weights. Every call begins with the same draws."""
        values = list[Tensor]()
        with undone(task, self.given.x.device), inline(task):
            change_weights(task, OTHER_WEIGHTS)
            for name, metrics in run(self.given):
                weights = weights_of(task.optimizers[name])
                values += [*metrics.values(), *(one.grad.clone() for one in weights if one.grad is not None)]
        return values

    def run(self, batch: Batch) -> Iterator[tuple[str, Metrics]]:
        """Replay the step on a batch. Like `Gradients`, yield after each update, which the caller then applies."""
        given = self.given
        if batch is not given:
            for mine, new in ((given.x, batch.x), (given.y, batch.y), (given.sample_ids, batch.sample_ids)):
                mine.copy_(new)
            assert isinstance(given.seed, Tensor)
            given.seed.fill_(batch.seed)
            if batch.numbers != self.numbers:
                self.numbers = batch.numbers
                for name, number in batch.numbers.items():
                    given.numbers[name].fill_(number)  # type: ignore[union-attr]
        for update in self.updates:
            for weight, gradient in update.gradients:
                weight.grad = gradient
            with section("replay of a training step"):
                update.replay()
            # A single copy: later replays overwrite the values.
            yield update.optimizer, dict(zip(update.names, update.values.clone().unbind(), strict=True))


class _Read(UserDict[str, Tensor]):
    """The numbers of a captured step, which remembers those that the step has read."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__(values)
        self.read = set[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


def captured(task: Task, batch: Batch, gradients: Gradients) -> CapturedStep | None:
    """Return the captured step of a task for batches like this, and capture it if such batches have occurred often."""
    graphs, facts = task.graphs, task.captures(batch)
    if graphs is None or graphs.mode not in ("step", "always") or facts is None or batch.bank is not None:
        return None
    # A subclass may read other values of a batch, so it defines the method too.
    if not graphs.may_capture(batch.x.device) or "captures" not in {*vars(task), *vars(type(task))}:
        return None
    if exchanges(task.model):
        graphs.tell("a training step runs without a CUDA graph: its BatchNorms wait for the other processes")
        return None
    tensors = (batch.x, batch.y, batch.sample_ids)
    shapes = tuple((one.shape, one.stride(), one.dtype, one.device) for one in tensors)
    try:
        values, objects, _ = identity_key(task.model)
        trained = tuple(weight.requires_grad for weight in task.model.parameters())
        own = weakref.ref(task), weak_key(getattr(task, "config", None)), trained
        key: Hashable = weak_key((own, facts, tuple(batch.numbers), shapes, numerics(batch.x.device), values))
    except TypeError:
        return None
    # A graph would not advance the generator of a model.
    if any(isinstance(one, (torch.Generator, random.Random, np.random.Generator)) for one in objects):
        return None
    # The captured step, or the number of such batches so far. It is below 0 after a capture that has failed.
    found = remember(graphs.whole_steps, key, graphs.whole_steps.get(key, 0), MOST_STEPS)
    if isinstance(found, int):
        found += 1
        if found > CAPTURE_STEPS or (graphs.mode == "always" and found > 0):
            begin, size = time.perf_counter(), reserved(batch.x.device)
            try:
                found = CapturedStep(task, batch, gradients, graphs, objects)
                graphs.log("a training step", time.perf_counter() - begin, reserved(batch.x.device) - size)
            except NotRestored:
                raise
            except Exception as error:
                # A user's model may raise any error. The training then continues without this graph.
                graphs.tell(f"a training step runs without a CUDA graph: {in_one_line(error)}")
                found = -RETRIED_AFTER
        graphs.whole_steps[key] = found
    return found if isinstance(found, CapturedStep) else None


@contextmanager
def inline(task: Task) -> Iterator[None]:
    """Within the block, attacks take their steps without graphs of their own."""
    before = task.graphs
    task.graphs = None if before is None else InlineSteps("always", before.capture)
    try:
        yield
    finally:
        task.graphs = before


@torch.no_grad()
def change_weights(task: Task, factor: float) -> None:
    """Multiply all trained weights in place, which also changes their version."""
    for optimizer in task.optimizers.values():
        torch._foreach_mul_(weights_of(optimizer), factor)


class NotRestored(Exception):
    """The weights are neither those before a step nor those after it, so the training must not continue.

    It is no RuntimeError, which would be read as one of memory that ran out, after which a step is repeated.
    """


def within_repeats(got: list[Tensor], repeats: list[list[Tensor]]) -> bool:
    """Return True if the results of a replay are those of the step, which was ``repeats`` times run without a graph.

    If the repeats are alike, the replay must be like them. A kernel that adds in another order in each call makes them
    differ. Then the replay must be as near to one of them as they are to each other, or at most twice as far. Results
    are compared together, each relative to its norm, because a single number differs much by chance. A result that is
    mostly rounding, such as the gradient of a bias before a BatchNorm, is compared alone, because it would hide others.
    """
    first, *others = repeats
    if any(len(other) != len(first) for other in (got, *others)):
        return False
    if all(alike(value, wanted) for other in others for value, wanted in zip(other, first, strict=True)):
        return all(map(alike, got, first))
    sizes = [value.double().norm().clamp_min(torch.finfo(torch.float32).tiny) for value in first]

    def differences(one: list[Tensor], other: list[Tensor]) -> Tensor:
        return torch.stack([(a - b).double().norm() / size for a, b, size in zip(one, other, sizes, strict=True)])

    apart = torch.stack([differences(one, other) for one, other in itertools.combinations(repeats, 2)])
    away = torch.stack([differences(got, repeat) for repeat in repeats])
    noise = apart.amax(0) > MOSTLY_NOISE
    together = away[:, ~noise].norm(dim=1).amin() <= 2 * apart[:, ~noise].norm(dim=1).amax()
    alone = away[:, noise].amin(0) <= 2 * apart[:, noise].amax(0)
    return bool(apart.isfinite().all() & together & alone.all())


@contextmanager
def undone(task: Task, device: torch.device) -> Iterator[None]:
    """After the block, restore the random generators, and the modes, weights, buffers and gradients of a training.

    Weights are restored first and without new memory, because the block may have ended when memory ran out.
    """
    model = task.model
    modes = [(module, module.training) for module in model.modules()]
    trained = {id(one): one for optimizer in task.optimizers.values() for one in weights_of(optimizer)}
    others = [one for one in (*model.parameters(), *model.buffers()) if id(one) not in trained]
    kept = [[(one, one.detach().clone(), one.grad) for one in group] for group in (trained.values(), others)]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        try:
            with torch.no_grad():
                for tensor, before, gradient in kept[0]:
                    tensor.copy_(before)
                    tensor.grad = gradient
                for tensor, before, gradient in kept[1]:
                    # A change of its version would make copies of a frozen classifier again. If memory has ended, the
                    # comparison fails, and the copy needs none.
                    same = False
                    with suppress(RuntimeError):
                        same = tensor.equal(before)
                    if not same:
                        tensor.copy_(before)
                    tensor.grad = gradient
        except Exception as error:
            raise NotRestored(f"the weights are not those before a trial of a CUDA graph: {error}") from error
        for module, training in modes:
            module.training = training
