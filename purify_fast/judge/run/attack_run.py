"""Runs an attack on its images, batch by batch. The batches are independent, so processes can share them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..._process import processes, sendable
from ..._settings import text_hash
from ...attacks import AttackResult, GradientHealth
from ...attacks.base import TimeIsOver
from ...ops import attack_loss
from ...ops.philox import Stream, philox, philox_key
from ...protocols import Classifier
from ..request.config import USUAL_BATCH
from ..request.deadline import Subject
from ..request.preparation import AttackSpec, check_adversarial
from ..results.rows import CUT
from ..searches.engine import Judge, JudgeContext

#: The revisions of `StoppingRule` and `NearestRule`. Increase a number whenever the same attack reaches other images:
#: cached rows are then made again.
REVISION, NEAREST_REVISION = 2, 2
#: The confidence of the bound on the images that may still fall, over all rounds together.
CONFIDENCE = 0.95
#: The most rounds of an attack, and the fewest images of a round: fewer take about the same time.
ROUNDS, SMALLEST = 8, 32
#: Images are ordered by their margin, but a random position may put an image further forward. The random positions are
#: uniform between 0 and RANDOM_SHARE times the number of images. With this value, about a fifth of the images in the
#: first round are there because of their random positions.
RANDOM_SHARE = 4


def by_margin(index: Tensor, margins: np.ndarray) -> Tensor:
    """Sort the indices of images, int64 ``[n]``, by the images' margins, ``[N]``; images without a margin come last."""
    reached = torch.from_numpy(margins)[index].nan_to_num(nan=math.inf)
    return index[reached.argsort(stable=True)]


def rounds_of(images: int, size: int) -> list[int]:
    """The sizes of the rounds in which a number of images is attacked."""
    return [min(size, images - begin) for begin in range(0, images, size)]


def nearest_first(index: Tensor, margins: np.ndarray, seed: int) -> Tensor:
    """Sort images into the order in which they are attacked."""
    near = by_margin(index, margins)
    place = torch.arange(len(near), device="cpu") / max(1, len(near))
    lots = philox(philox_key(seed, near.device), near, 1, stream=Stream.LOTS, distribution="uniform")
    return near[torch.minimum(place, RANDOM_SHARE * lots.flatten()).argsort(stable=True)]


class StoppingRule:
    """Decides after each round whether an attack stops.

    Args:
        share: the largest number of unsearched images that may still fall when the attack stops, as a share of all
            images.
        images: number of images that the attack got.
        total: number of all images, including those that the attack did not get.

    Attributes:
        unsearched: number of images that the attack has not reached.
        misses: number of images that withstood since the last image that fell; only images whose search could have
            succeeded count.
    """

    def __init__(self, share: float, images: int, total: int):
        self.allowed, self.unsearched, self.misses = share * total, images, 0
        #: The number of images in each round.
        self.rounds = rounds_of(images, max(SMALLEST, math.ceil(images / ROUNDS)))
        self._error = (1 - CONFIDENCE) / max(1, len(self.rounds))

    @property
    def may_hold(self) -> float:
        """The largest number of unsearched images that would fall, with the confidence `CONFIDENCE`."""
        left, fall = self.unsearched, 0
        # If ``fall`` of the unsearched images and those that withstood fall, the chance that all are unsearched.
        chance = 1.0
        while fall < left and (chance := chance * (left - fall) / (left + self.misses - fall)) >= self._error:
            fall += 1
        return float(fall)

    def record(self, leads: Sequence[float], no_evidence: int) -> bool:
        """Record a round: the margins of its images after the attack, and how many searches are no evidence."""
        fell = [not lead > 0 for lead in leads]
        self.unsearched -= len(fell)
        since = next((number for number, has in enumerate(reversed(fell)) if has), len(fell))
        self.misses = (self.misses if since == len(fell) else 0) + max(0, since - no_evidence)
        return self.may_hold <= self.allowed


class NearestRule:
    """Goes on to the next group of the nearest images until a whole group has withstood the attack.

    Args:
        images: number of images that the attack got.
        group: number of images in a group.
    """

    may_hold = 0.0

    def __init__(self, images: int, group: int):
        self.unsearched, self.rounds = images, rounds_of(images, group)

    def record(self, leads: Sequence[float], no_evidence: int) -> bool:
        """Record a group, see `StoppingRule.record`."""
        self.unsearched -= len(leads)
        return all(lead > 0 for lead in leads)


# -- runs an attack on its images, batch by batch. The batches are independent, so processes can share them ------------

logger = logging.getLogger("purify_fast")

#: The longest wait for another process. A batch may take hours; a process that ends is noticed immediately.
PATIENCE = timedelta(days=7)


def _nothing(_: object) -> bool:
    return False


class Shards:
    """The processes of an evaluation. In a ``with`` block, an error in one process is raised in all of them."""

    def __init__(self, together: bool = True):
        self.rank, self.world = processes() if together else (0, 1)
        # Whether the other processes know that the evaluation has ended, or cannot be reached.
        self._over = self._finished = False
        self._failed: BaseException | None = None

    def __enter__(self) -> Shards:
        if self.world > 1:
            # This group works on the CPU, also if the default group does not.
            self._group: Any = dist.new_group(timeout=PATIENCE, backend="gloo")
        if self.rank > 0:
            # Only the first process logs messages, so that each message appears once.
            logger.addFilter(_nothing)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        logger.removeFilter(_nothing)
        if self.world == 1:
            return
        self._failed = error
        with contextlib.suppress(Exception):
            if error is not None and self.rank == 0 and not self._over:
                self._announce("error", sendable(error))
            while error is not None and self.rank > 0 and not self._over:
                self.follow()
            if self._finished:
                # A process that ends closes its connections, from which others may still read.
                dist.barrier(self._group)
                dist.destroy_process_group(self._group)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Call ``make`` in the first process, and return its result in all processes."""
        if self.rank > 0:
            return self.follow()
        value = make()
        if self.world > 1:
            self._announce("value", value)
        return value

    def check_same(self, call: Mapping[str, Any]) -> None:
        """Raise ValueError if this process evaluates something else than the first; ``call`` has the facts by name."""
        first = self.from_first(lambda: dict(call))
        different = [name for name, value in call.items() if value != first[name]]
        if different:
            raise ValueError(
                f"process {self.rank} evaluates something else than process 0 (different: {', '.join(different)}): "
                "call evaluate with the same arguments in all processes, or with together=False in each process"
            )

    def share(self, numbers: Sequence[int], make: Callable[[int], Any]) -> list[Any]:
        """In the first process: call ``make`` for each number, in one of the processes, and return the results."""
        if self.world == 1:
            return [make(number) for number in numbers]
        self._announce("share", list(numbers))
        return self._shared(numbers, make)

    def follow(self, make: Callable[[int], Any] = _nothing) -> Any:
        """In another process: do its part of each `share` until the first process sends a value; return the value."""
        while True:
            kind, content = self._announce()
            if kind == "share":
                self._shared(content, make)
                continue
            self._over, self._finished = kind != "value", kind == "end"
            if kind == "error":
                raise content
            return content

    def end(self, report: Callable[[], str]) -> None:
        """In the first process: send the report to the others, if there are any."""
        if self.world > 1:
            self._announce("end", report())
            self._over = self._finished = True

    def _announce(self, kind: str = "", content: Any = None) -> tuple[str, Any]:
        message = [(kind, content)]
        self._exchange(dist.broadcast_object_list, message, src=0)
        return message[0]

    def _shared(self, numbers: Sequence[int], make: Callable[[int], Any]) -> list[Any]:
        error, results = self._failed, list[Any]()
        try:
            results = [] if error else [make(number) for number in numbers[self.rank :: self.world]]
        except Exception as own:
            error = own
        every: list[Any] = [None] * self.world
        self._exchange(dist.all_gather_object, every, (results, None if error is None else sendable(error)))
        if failed := [reason for _, reason in every if reason is not None]:
            self._over = True
            raise error or failed[0]
        return [every[place % self.world][0][place // self.world] for place in range(len(numbers))]

    def _exchange(self, call: Callable[..., None], *content: Any, **options: Any) -> None:
        try:
            call(*content, group=self._group, **options)
        except RuntimeError as error:
            self._over = True
            raise ConnectionError(
                f"process {self.rank} of {self.world} does not reach the others ({str(error).splitlines()[0]}): start "
                "the same command again to continue after the finished attacks (torchrun --max-restarts does this)"
            ) from error


# -- runs an attack on its images, batch by batch. The batches are independent, so processes can share them ------------

#: The names of the counts that `GradientHealth` keeps.
COUNTS = ("gradients", "nonfinite", "zero", "images", "unmoved")


@dataclass
class AttackedBatch:
    """The outcome of an attack on one batch; ``leads`` are the attacked model's margins, or empty if not needed."""

    images: Tensor
    health: GradientHealth
    seconds: float
    warnings: list[str] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)
    gave_up: int = 0


@dataclass
class AttackRun:
    """The batches of an attack, which this class makes and sums up.

    On a deterministic model most results do not depend on the batches. On a random model each batch has a separate
    seed. The batches depend only on the images and their order, on the batch size and on the rule. ``rounds`` are the
    rule's rounds.
    """

    spec: AttackSpec
    target: Classifier
    index: Tensor
    subject: Subject
    context: JudgeContext
    rule: StoppingRule | NearestRule | None = None

    def __post_init__(self) -> None:
        most = self.context.batch_size or max(1, len(self.index))
        if self.spec.nearest is not None:
            # An attack on the nearest images makes many runs from each, so it is divided in the usual ratio.
            most = min(most, max(1, self.spec.nearest * most // USUAL_BATCH))
        self.parts, self.rounds, self.last = list[Tensor](), list[range](), range(0)
        for images in self.index.split(self.rule.rounds if self.rule else [len(self.index)]):
            if len(images):
                parts = images.chunk(math.ceil(len(images) / most)) if self.rule else images.split(most)
                self.rounds.append(range(len(self.parts), len(self.parts) + len(parts)))
                self.parts += parts
        #: The number of images whose batches were attacked; `last` has the numbers of the last round's batches.
        self.reached = 0
        #: The attacked images, with the clean images in place of others, and the sums over the batches.
        self.images, self.health = self.subject.x.clone(), GradientHealth(dict.fromkeys(COUNTS, 0))
        self.seconds, self.warnings = 0.0, list[str]()
        self._made = dict[int, AttackedBatch]()

    def make(self, number: int) -> AttackedBatch:
        """Attack the images of a batch."""
        part = self.parts[number]
        # With a seed for each batch, any process would make the same batch at any time. The first batch needs no new
        # seed, because the generators were seeded for the attack.
        if number > 0:
            torch.manual_seed(int(text_hash(f"{self.subject.seed} 0 {number}").hexdigest()[:15], 16))
        batch = self._attacked(part)
        if self.rule is not None and CUT not in batch.warnings:
            try:
                batch.leads = self.subject.batch_limit.within(lambda: self._leads(part, batch.images))
            except TimeIsOver:
                batch.warnings.append(CUT)
        return batch

    def _attacked(self, part: Tensor) -> AttackedBatch:
        """Attack some images, with fewer images per pass if memory runs out."""
        begin, attack, subject, context = time.perf_counter(), self.spec.attack, self.subject, self.context
        x, y, ids = (tensor.to(subject.device) for tensor in (subject.x[part], subject.y[part], part))

        def search() -> AttackResult:
            most = subject.batch_limit.limit(context.max_forward_batch)
            batch_context = dataclasses.replace(context, sample_ids=ids, counts_health=True, max_forward_batch=most)
            # A copy, because the later check of the radius would not see a change in place.
            return attack.search(self.target, x.clone(), y, batch_context)

        try:
            result = subject.batch_limit.within(lambda: context.graphs.retry_without_graphs(search, subject.device))
        except TimeIsOver as over:
            result = AttackResult(x if over.points is None else over.points, warnings=[CUT])
        # A search may have caught the error that ended it, so the deadline itself is asked.
        if subject.deadline.over and CUT not in result.warnings:
            result.warnings.append(CUT)
        check_adversarial(attack.name(context), result.images, x, attack.threat_model(context))
        counted = result.health or GradientHealth()
        health = GradientHealth({name: counted.count(name) for name in COUNTS})
        # The transfer to the CPU waits until the device has finished, so that the duration is complete.
        images, gave_up = result.images.detach().cpu(), int(result.gave_up)
        return AttackedBatch(images, health, time.perf_counter() - begin, result.warnings, gave_up=gave_up)

    def _leads(self, part: Tensor, images: Tensor) -> list[float]:
        """Return the margin of the attacked model on each attacked image."""
        subject, most = self.subject, self.subject.batch_limit.limit(self.context.max_forward_batch)
        logits = Judge(self.target, max_forward_batch=most).logits(images.to(subject.device))
        return (-attack_loss(logits.double(), subject.y[part].to(logits.device), "margin")[1]).tolist()

    def run(self, shards: Shards, reach: Callable[[int], None]) -> None:
        """Obtain all batches from the processes, and sum up their results; ``reach`` gets the images of each batch."""
        for numbers_of_round in self.rounds:
            self.last, leads, no_evidence = numbers_of_round, list[float](), 0
            for number in numbers_of_round:
                if number not in self._made:
                    if CUT in self.warnings:
                        break
                    # Each further process makes one of the following batches.
                    numbers = range(number, len(self.parts))[: shards.world]
                    self._made |= zip(numbers, shards.share(numbers, self.make), strict=True)
                part, batch = self.parts[number], self._made.pop(number)
                reach(len(part))
                self.reached += 0 if CUT in batch.warnings else len(part)
                self.images[part] = batch.images.to(self.images.device)
                self.seconds += batch.seconds
                self.health.add(**batch.health.counts)
                self.warnings += [text for text in batch.warnings if text not in self.warnings]
                # A search that stood still or lacked gradients says nothing about other images.
                usable = not batch.health.count("gradients") or batch.health.reliable
                no_evidence += batch.gave_up if usable else len(batch.leads)
                leads += batch.leads
            if CUT in self.warnings or (self.rule is not None and self.rule.record(leads, no_evidence)):
                break
