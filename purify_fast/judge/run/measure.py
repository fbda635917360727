"""Makes the rows of an evaluation: for each row, an attack runs, and new predictions judge the attacked images."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..._settings import digest
from ...attacks import frozen
from ...defences.stochastic import WithAggregation
from ...protocols import Classifier, Passes, SharesDraws, supports
from ..request.deadline import Deadline, Judgement, Subject
from ..request.preparation import AttackSpec, row_name, threat_name
from ..results.cache import RowCache
from ..results.rows import CUT, Examples, Points, Row
from ..searches.engine import JudgeContext, has_fallen
from . import attack_run
from .attack_run import AttackRun, NearestRule, Shards, StoppingRule

#: The shortest time between two lines of a log, and the time of the first line, in seconds.
LINE_EVERY, FIRST_LINE = 30.0, 10.0


class Progress:
    """Counts the images in the passes of an evaluation, and shows the progress.

    ``total`` is the number of rows. Each pass of a counted model asks for the ``deadline``.
    """

    def __init__(self, name: str = "", shown: bool = False, total: int = 0, deadline: Deadline | None = None):
        self.name, self.shown, self.total = name, shown, total
        self.deadline = Deadline() if deadline is None else deadline
        self.lines = shown and not sys.stderr.isatty()
        self.rows, self.images, self.in_row = 0, Passes(), 0
        self.label, self.bar = "", None
        self.began = self.row_began = time.monotonic()
        self.last_line = self.began + min(FIRST_LINE, LINE_EVERY) - LINE_EVERY

    @property
    def seconds(self) -> float:
        """The time since this object was made."""
        return time.monotonic() - self.began

    def plan(self, images: int) -> None:
        """Print the number of attacks; nothing predicts how long their searches take."""
        if self.shown:
            self._print(f"plan: {self.total - self.rows} attacks on {images} images")

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
            self.deadline.ask(images)
        self.images += images
        self.in_row += images.forwards
        if self.bar is None or not self.shown:
            return
        rate = self.in_row / max(time.monotonic() - self.row_began, 1e-9)
        pace = f"{self.in_row:,} predictions, {rate:,.0f} predictions/s"
        self.bar.set_postfix_str(pace, refresh=False)
        self.bar.update(0)
        if self.lines and time.monotonic() - self.last_line >= LINE_EVERY:
            self._print(f"row {self.label}: {pace}")

    def finished(self, result: str) -> None:
        """Write the short result of a row to the log."""
        if self.lines:
            self._print(f"{result} ({tqdm.format_interval(self.seconds)})")

    def _print(self, text: str) -> None:
        self.last_line = time.monotonic()
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)


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


# -- measure -----------------------------------------------------------------------------------------------------------

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
        alive = self.withstood(before.wrong)
        index, rule = self.in_order(spec, torch.from_numpy(alive).nonzero()[:, 0], table.margins)
        images: dict[str, Any] = {"alive": digest(torch.from_numpy(alive)), "order": digest(index)}
        if self.subject.is_random:
            images["known"] = digest(*map(torch.from_numpy, before))
        make = functools.partial(self.judged, spec, index, rule, before)
        row = self.load_or_make(settings_of(spec, self.subject, self.context) | images, spec, make)
        # The key of a cached row does not contain the row's name, so it may have been made under another name.
        row.attack = row_name(spec, self.context)
        self.progress.rows += 1
        return row

    def in_order(self, spec: AttackSpec, index: Tensor, margins: np.ndarray) -> tuple[Tensor, Rule | None]:
        """Return the indices of the images that an attack gets, int64, in their order, and when the attack stops."""
        if spec.nearest is not None:
            return attack_run.by_margin(index, margins), NearestRule(len(index), spec.nearest)
        if spec.until is not None:
            index = attack_run.nearest_first(index, margins, self.subject.seed + spec.seed)
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
        return ~has_fallen(torch.tensor(wrong), self.context.judge_share).numpy()

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
        # The number of draws is recorded here, because it is 1 if the target turned out to be deterministic.
        draws = {name: value for name, value in spec.attack.settings(run.context).items() if name == "eot_iter"}
        row = self.new_row(judged.right, attack="", kind=spec.attack.kind, attacked=len(index), warnings=run.warnings)
        # None if no gradient was counted.
        counted = run.health.count("gradients") > 0
        row.health = {name: run.health.count(name) for name in run.health.counts} if counted else None
        row.reliable, row.nonfinite_predictions = run.health.reliable, judged.nonfinite
        row.settings = settings_of(spec, subject, self.context) | draws
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
    optional = {
        "through": None if spec.through is None else type(spec.through).__name__,
        "seed": spec.seed or None,
        "published": spec.published,
        "until": None if spec.until is None else [spec.until, attack_run.REVISION],
        "nearest": None if spec.nearest is None else [spec.nearest, attack_run.NEAREST_REVISION],
    }
    return spec.attack.settings(context) | {
        "max_images": spec.max_images,
        "survivors_only": spec.survivors_only,
        "n_eval": subject.judges,
        **{name: value for name, value in optional.items() if value is not None},
    }
