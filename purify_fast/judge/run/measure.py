"""Makes the rows of an evaluation: an attack runs on its images, and new predictions judge the attacked images.

An attack runs batch by batch. The batches are independent, so processes can share them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..._settings import digest, text_hash
from ...attacks import AttackResult, GradientHealth, frozen
from ...attacks.base import TimeIsOver
from ...defences.stochastic import WithAggregation
from ...ops import attack_loss
from ...ops.philox import Stream, philox, philox_key
from ...protocols import Classifier, Passes, SharesDraws, supports
from ..request.config import USUAL_BATCH
from ..request.deadline import Deadline, Judgement, Subject
from ..request.preparation import AttackSpec, check_adversarial, row_name, threat_name
from ..results.cache import RowCache
from ..results.rows import CUT, Examples, Points, Row
from ..searches.engine import Judge, JudgeContext, has_fallen
from ..shards import Shards

#: The shortest time between two lines of a log, and the time of the first line, in seconds.
LINE_EVERY, FIRST_LINE = 30.0, 10.0
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


class Progress:
    """Counts the images in the passes of an evaluation, and shows the progress.

    ``total`` is the number of rows. Each pass of a counted model asks for the ``deadline``.
    """

    def __init__(self, name: str = "", shown: bool = False, deadline: Deadline | None = None):
        self.name, self.shown, self.total = name, shown, 0
        self.deadline = Deadline() if deadline is None else deadline
        self.lines = shown and not sys.stderr.isatty()
        self.rows, self.images, self.in_row = 0, Passes(), 0
        self.label, self.bar = "", None
        self.began = self.row_began = time.monotonic()
        self.last_line = self.began + min(FIRST_LINE, LINE_EVERY) - LINE_EVERY

    @contextlib.contextmanager
    def row(self, label: str, images: int | None = None) -> Iterator[None]:
        """A context in which passes are counted for a row, which attacks a number of images."""
        self.in_row, self.row_began = 0, time.monotonic()
        place = f"{self.rows + 1} of {max(self.total, self.rows + 1)}"
        self.label, text = f"{place}, {label}", f"{self.name}: {label} ({place})"
        options: dict[str, Any] = {"unit": " images", "leave": False, "dynamic_ncols": True, "miniters": 0}
        try:
            with tqdm(total=images, desc=text, disable=self.lines or not self.shown, **options) as self.bar:
                yield
        finally:
            self.bar = None

    def reach(self, images: int) -> None:
        """Show that the attack of the row is done with some further images."""
        assert self.bar is not None
        self.bar.update(images)

    def count(self, images: Passes) -> None:
        """Ask for the time, count images of passes, and write a line to the log if the last line is old."""
        if images.forwards >= 0:
            self.deadline.ask()
        self.images += images
        self.in_row += images.forwards
        if self.bar is None or not self.shown:
            return
        rate = self.in_row / max(time.monotonic() - self.row_began, 1e-9)
        pace = f"{self.in_row:,} predictions, {rate:,.0f} predictions/s"
        self.bar.set_postfix_str(pace, refresh=False)
        self.bar.update(0)
        if self.lines and time.monotonic() - self.last_line >= LINE_EVERY:
            self.say(f"row {self.label}: {pace}")

    def say(self, text: str) -> None:
        """Print a line with the time since the evaluation began."""
        self.last_line = now = time.monotonic()
        if self.shown:
            print(f"{self.name}: {text} ({tqdm.format_interval(now - self.began)})", file=sys.stderr, flush=True)


class CountedModel(nn.Module):
    """A module that wraps any callable, and counts the images of its forward passes. AutoAttack requires a module.

    There is a single such object for each model, because a CUDA graph belongs to the module of its capture.
    """

    #: Changes of these need no new CUDA graph (`purify_fast.model_state`).
    not_dependencies = frozenset({"progress"})

    def __init__(self, model: Classifier, progress: Progress):
        super().__init__()
        self.model, self.progress = model, progress
        self.training = False

    def train(self, mode: bool = True) -> CountedModel:
        """Do nothing, so that an attack cannot change the model's evaluation mode."""
        return self

    def around(self, replace: Callable[[Classifier], Classifier]) -> CountedModel:
        """Return a new wrapper, which adds to the same count; its model is ``replace`` of this wrapper's model."""
        return counted_model(replace(self.model), self.progress)

    def counted(self) -> Passes:
        """The counts so far; each draw of an image counts as an image."""
        return self.progress.images

    def count(self, images: Passes) -> None:
        """Add to the counts, also when a CUDA graph is replayed; negative numbers take back trial calls."""
        self.progress.count(images)

    def forward(self, x: Tensor) -> Tensor:
        self.count(Passes(len(x), len(x) * x.requires_grad))
        return self.model(x)


class _CountedDraws(CountedModel):
    """A counter around a model with ``draw_logits``, which makes several draws together."""

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        self.count(Passes(len(x), len(x) * x.requires_grad) * draws)
        return self.model.draw_logits(x, draws)  # type: ignore[attr-defined]


def counted_model(model: Classifier, progress: Progress) -> CountedModel:
    """Wrap a model in a module that counts the images of its forward passes."""
    return (_CountedDraws if supports(model, SharesDraws) else CountedModel)(model, progress)


# -- the order of the images, and the rules by which an attack stops ---------------------------------------------------


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


# -- the batches of an attack ------------------------------------------------------------------------------------------

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
            batch_context = replace(context, sample_ids=ids, counts_health=True, max_forward_batch=most)
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


# -- the rows ----------------------------------------------------------------------------------------------------------

#: The number of attacked images that each row stores for the pictures.
EXAMPLES = 8
Rule = StoppingRule | NearestRule


@dataclass
class Table:
    """The columns of a threat model: the clean row, and the rows of the attacks so far.

    ``images`` has, for each image that fell, the label of the attack and the attacked image.
    """

    rows: list[Row]
    images: dict[int, tuple[str, np.ndarray]] = field(default_factory=dict)

    @property
    def points(self) -> Points:
        """The worst point of each image; it is the clean image until an attack is added."""
        return Points.worst(self.rows, self.rows[0].n)

    @property
    def margins(self) -> np.ndarray:
        """The smallest margin that an attack has reached on each image, ``[N]``."""
        reached = np.full(self.rows[0].n, np.inf)
        for row in self.rows[1:]:
            reached[: row.n] = np.fmin(reached[: row.n], row.points.margins)
        return reached

    def add(self, row: Row) -> None:
        """Add the row of another attack."""
        worse = row.points.is_worse(self.points.at(slice(row.n)))
        if row.fallen is not None and row.fallen_images is not None:
            for index, image in zip(row.fallen.tolist(), row.fallen_images, strict=True):
                if worse[index] or index not in self.images:
                    # A view would keep the memory of all images.
                    self.images[index] = row.attack, image.copy()
        row.fallen = row.fallen_images = None
        self.rows.append(row)

    def fallen(self) -> list[tuple[int, str, np.ndarray]]:
        """The attacked images of the images that fell: their indices, the labels of their attacks, and the images."""
        # On a random model, the draws that judge the worst point of an image decide.
        fell = np.flatnonzero(~self.points.right.all(axis=0))
        return [(index, *self.images[index]) for index in fell.tolist() if index in self.images]


@dataclass
class Measure:
    """Makes the rows of one call of `evaluate`. Every process has the same ``attacks`` in the same order."""

    subject: Subject
    context: JudgeContext
    name: str
    cache: RowCache
    progress: Progress
    shards: Shards
    attacks: list[AttackSpec] = field(default_factory=list, init=False)
    _targets: dict[int, CountedModel] = field(default_factory=dict, init=False)

    @functools.cached_property
    def clean(self) -> Row:
        """The row of the clean images."""

        def make() -> Row:
            begin, judged = time.monotonic(), self.subject.judge(self.subject.x, "judge")
            row = self.new_row(judged.right, attack="clean", kind="clean", nonfinite_predictions=judged.nonfinite)
            if self.subject.is_random:
                chosen = self.subject.judge(self.subject.x, "choose")
                row.wrong, row.margins = chosen.wrong, chosen.margins
            row.seconds = time.monotonic() - begin
            return row

        return self.load_or_make({"clean": True, "n_eval": self.subject.judges}, None, make)

    def judging(self) -> float:
        """The seconds that a judgement of attacked images takes at most: clean images were judged in the same way."""
        # A deterministic model also predicts attacked images twice, to see whether it draws random numbers for them. A
        # random model predicts those that fell once more, for `check_adversarial`.
        return self.clean.seconds * (2 if self.subject.is_random else 3)

    def attacked(self, spec: AttackSpec, table: Table) -> Row:
        """The row of an attack."""
        before = (table.points if spec.survivors_only else self.clean.points).at(slice(spec.max_images))
        alive = torch.from_numpy(self.withstood(before.wrong)).nonzero()[:, 0]
        index, rule = self.in_order(spec, alive, table.margins)
        images = {"order": digest(index), "known": digest(*map(torch.from_numpy, before))}
        make = functools.partial(self.judged, spec, index, rule, before)
        row = self.load_or_make(settings_of(spec, self.subject, self.context) | images, spec, make)
        # The key of a cached row does not contain the row's name, so it may have been made under another name.
        row.attack = row_name(spec, self.context)
        self.progress.rows += 1
        return row

    def in_order(self, spec: AttackSpec, index: Tensor, margins: np.ndarray) -> tuple[Tensor, Rule | None]:
        """Return the indices of the images that an attack gets, int64, in their order, and when the attack stops."""
        if spec.nearest is not None:
            return by_margin(index, margins), NearestRule(len(index), spec.nearest)
        if spec.until is not None:
            index = nearest_first(index, margins, self.subject.seed + spec.seed)
            return index, StoppingRule(spec.until, len(index), len(self.subject.y))
        return index, None

    def load_or_make(self, settings: dict[str, Any], spec: AttackSpec | None, make: Callable[[], Row]) -> Row:
        """Read the row with these settings from the cache, or make the row and cache it. The clean row has no spec."""
        subject, context, attack = self.subject, self.context, None if spec is None else spec.attack
        revision = "" if attack is None else attack.revision()
        content = {
            "data": subject.data,
            "seed": subject.seed,
            "classes": subject.num_classes,
            # The draws of a random model for an image depend on how the images are divided into batches.
            "batches": [context.batch_size, context.max_forward_batch] if subject.is_random else [],
            "judges": [context.judge_draws, context.judge_share, subject.choosing],
            "attack": [] if attack is None else [attack.kind, revision, *attack.identity()],
            "settings": settings,
        }
        # The row of an attack without a revision is not cached, because nothing would show a change of the attack.
        models = [subject.model] if spec is None else [subject.model, spec.through]
        row = self.cache.row(None if revision is None else self.cache.key(content, *models), make)
        # The following fields are not a part of the key, so they are also set for a cached row.
        row.model = self.name
        row.threat = None if spec is None else threat_name(spec, context)
        row.deterministic = not subject.is_random
        # Missing gradients are no reason for doubt if every image fell.
        row.reliable = row.reliable or bool((row.share_wrong == 1).all())
        return row

    def follow(self) -> str:
        """In another process than the first: make a part of all batches; return the report of the first process."""
        job = self.shards.follow()
        while isinstance(job, tuple):
            left, *job = job
            with self._run(*job) as run:
                self.subject.deadline.begin(time.monotonic() + left)
                job = self.shards.follow(run.make)
                self.subject.deadline.begin()
        return str(job)

    @contextlib.contextmanager
    def _run(
        self, number: int, index: Tensor, rule: Rule | None, draws_differ: bool | None = None
    ) -> Iterator[AttackRun]:
        """A context with the run of an attack on images in their order. The first process tells if draws differ."""
        spec, subject = self.attacks[number], self.subject
        subject.reseed("attack")
        # An attack that follows the gradients of another model attacks the model itself.
        followed = spec.through if spec.attack.follows_gradients else None
        target = spec.attack.target(subject.model) if spec.through is followed else cast(Classifier, spec.through)
        with frozen(target):
            # Some aggregations give infinite logits, which hide differences, and some models draw only for attacked
            # images: the draws are then taken as different.
            timed = subject.deadline.watch(target)
            hidden = subject.is_random and (subject.draws or not timed(subject.sample_images()).isfinite().all())
            # Every process makes this test, whose draws must leave all random generators in the same state.
            varies = hidden or subject.answers_vary(timed, elsewhere=subject.is_random)
            varies = varies if draws_differ is None else draws_differ
            source = None if followed is None else self._counted(followed)
            seed = subject.seed + spec.seed
            context = replace(self.context, draws_differ=varies, gradients_from=source, seed=seed)
            if context.draws_differ:
                rule, index = None, index[: spec.nearest]
            yield AttackRun(spec, self._counted(target), index, subject, context, rule=rule)

    def _counted(self, model: Classifier) -> CountedModel:
        """The counter around a model: a single one for each model, because a captured step belongs to it."""
        return self._targets.setdefault(id(model), counted_model(model, self.progress))

    # -- the judgement of attacked images, by new predictions ----------------------------------------------------------

    def withstood(self, wrong: np.ndarray) -> np.ndarray:
        """Tell which images have not fallen, bool ``[n]``, by the shares of draws that are wrong."""
        return ~has_fallen(torch.from_numpy(wrong), self.context.judge_share).numpy()

    def new_row(self, right: np.ndarray, **values: Any) -> Row:
        """Make a row from predictions."""
        subject, shared = self.subject, self.subject.shares_draws
        return Row(model=self.name, right=right, seed=subject.seed, data=subject.data, shares_draws=shared, **values)

    def judged(self, spec: AttackSpec, index: Tensor, rule: Rule | None, before: Points) -> Row:
        """Run an attack, judge its images, and make the row. ``before`` are the points from which the row counts."""
        number = self.attacks.index(spec)
        with self._run(number, index, rule) as run:
            left = self.subject.deadline.until - time.monotonic()
            self.shards.from_first(lambda: (left, number, index, rule, run.context.draws_differ))
            with self.progress.row(row_name(spec, self.context), len(run.index)):
                run.run(self.shards, self.progress.reach)
        begin, subject, other, index = time.perf_counter(), self.subject, spec.through, run.index
        attacked = run.images[: spec.max_images]
        # A model that differs only in the aggregation of its samples is not taken as another model.
        same = isinstance(other, WithAggregation) and other.defence is subject.base_model and not other.without_noise
        subject.check_repeats(attacked[index])
        judged = subject.judge(attacked, "judge")
        row = self.new_row(judged.right, attack="", kind=spec.attack.kind, attacked=len(index), warnings=run.warnings)
        # None if no gradient was counted.
        row.health = {name: run.health.count(name) for name in COUNTS} if run.health.count("gradients") else None
        row.reliable, row.nonfinite_predictions = run.health.reliable, judged.nonfinite
        # They have a single draw for each step if the target turned out to be deterministic.
        row.settings = settings_of(spec, subject, run.context)
        row.may_end_early, row.uses_gradients = spec.attack.may_end_early(run.context), spec.attack.uses_gradients
        row.transferred = other is not None and not same
        if CUT in run.warnings:
            # Nothing bounds how many of the images would fall to a whole search.
            row.unsearched, row.may_hold = len(index) - run.reached, float(len(index))
        elif run.rule is not None:
            row.unsearched, row.may_hold = run.rule.unsearched, run.rule.may_hold
        own = Points(judged.wrong, judged.margins, judged.right).at(index.numpy())
        if subject.is_random and len(index):
            chosen = subject.judge(attacked[index], "choose", index)
            own = own._replace(wrong=chosen.wrong, margins=chosen.margins)
        # An image that was not attacked keeps its clean point.
        own = self.clean.points.at(slice(len(attacked))).put(index.numpy(), own)
        points = before.or_worse(own) if spec.survivors_only else own
        row.wrong = own.wrong if subject.is_random else None
        row.take(points)
        fallen = index[torch.from_numpy(~judged.right.all(0))[index]]
        if spec.nearest is not None:
            group = torch.cat([index[:0], *(run.parts[number] for number in run.last)])
            row.last_fallen = int((~self.withstood(row.share_wrong))[group.numpy()].sum())
        row.examples = self._examples(index, index[torch.from_numpy(own.wrong > 0.5)[index]], attacked, judged)
        row.fallen, row.fallen_images = fallen.numpy(), attacked[fallen].cpu().numpy()
        row.seconds = time.perf_counter() - begin + run.seconds
        return row

    def _examples(self, index: Tensor, fallen: Tensor, images: Tensor, judged: Judgement) -> Examples | None:
        """Select the images that a page shows: some of the fallen images, or some others if no image fell."""
        subject, shown = self.subject, (fallen if len(fallen) else index)[:EXAMPLES]
        clean, adversarial, labels = (tensor[shown].cpu().numpy() for tensor in (subject.x, images, subject.y))
        fell, predicted = np.full(len(shown), len(fallen) > 0), judged.classes[shown.numpy()]
        return Examples(clean, adversarial, labels, fell, predicted) if len(shown) else None


def settings_of(spec: AttackSpec, subject: Subject, context: JudgeContext) -> dict[str, Any]:
    """The settings of an attack, in plain values, on which its row depends."""
    return spec.attack.settings(context) | {
        "max_images": spec.max_images,
        "survivors_only": spec.survivors_only,
        "n_eval": subject.judges,
        "through": None if spec.through is None else type(spec.through).__name__,
        "seed": spec.seed or None,
        "until": None if spec.until is None else [spec.until, REVISION],
        "nearest": None if spec.nearest is None else [spec.nearest, NEAREST_REVISION],
    }
