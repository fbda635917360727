"""Makes the rows of an evaluation: for each row, an attack runs, and new predictions judge the attacked images."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._tensors import digest
from ...attacks import frozen
from ...attacks.bpda import classifier_of
from ...defences.wrappers import WithAggregation
from ...model_state import is_users
from ...protocols import Classifier, has_classifier
from ..request.naming import NOT_ADAPTIVE, clean_name, row_name, threat_name
from ..request.specs import CLASSIFIER, AttackSpec, FunctionAttack
from ..request.subject import Judgement, Subject, Variant
from ..results.rows import AUTHORS, CUT, VARIANTS_APART, Examples, Row, Worst, by_worst_points
from ..searches.engine.judge import has_fallen
from ..searches.judge_context import JudgeContext
from .attack_run import AttackedBatch, AttackRun, counts_of
from .cache import RowCache
from .progress import CountedModel, Progress, counted_model
from .shards import Shards
from .stopping import GROUP, NearestRule, StoppingRule, by_margin, nearest_first
from .stopping import REVISION as STOPPING

#: The number of attacked images that each row stores for the pictures.
EXAMPLES = 8


class AttackJob(NamedTuple):
    """An attack that all processes share; ``images`` are in the order of the attack. ``left``: the seconds left."""

    attack: int
    images: Tensor
    rule: StoppingRule | NearestRule | None
    draws_differ: bool | None = None
    left: float = math.inf


@dataclass
class Standing:
    """The images after the attacks on a variant in a threat model, in arrays ``[n]``, and the attacks' ``rows``.

    ``left`` are the images that withstood every attack, ``margins`` the smallest margins that any attack has reached,
    ``first`` the margins after the first attack, and ``points`` the worst attacked image of each image that fell, with
    its share of wrong draws and its negative margin, and the attack's label.
    """

    left: np.ndarray
    margins: np.ndarray
    first: np.ndarray | None = None
    rows: list[Row] = field(default_factory=list)
    points: dict[int, tuple[tuple[float, float], str, np.ndarray]] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """The largest amount by which attacks after the first lowered the margin of an image that still stands."""
        if self.first is None:
            return 0.0
        margins = self.margins[: len(self.first)]
        known = self.left[: len(self.first)] & np.isfinite(self.first) & np.isfinite(margins)
        return float((self.first - margins)[known].max(initial=0.0))

    def add(self, row: Row, withstood: np.ndarray) -> None:
        """Add the row of another attack."""
        self.rows.append(row)
        self.left[: row.n] &= withstood
        if row.margins is not None:
            self.first = row.margins if self.first is None else self.first
            self.margins[: row.n] = np.fmin(self.margins[: row.n], row.margins)
        if row.fallen is not None and row.fallen_images is not None and row.margins is not None:
            for index, image in zip(row.fallen.tolist(), row.fallen_images, strict=True):
                how_bad = float(row.share_wrong[index]), -float(row.margins[index])
                if index not in self.points or how_bad > self.points[index][0]:
                    # A view would keep the memory of all images.
                    self.points[index] = how_bad, row.attack, image.copy()
            row.fallen = row.fallen_images = None

    def fallen(self, clean: Row) -> list[tuple[int, str, np.ndarray]]:
        """The attacked images of the images that fell: their indices, the labels of their attacks, and the images."""
        points = self.points
        if clean.wrong is not None and self.rows:
            # On a random model, the draws that judge the worst point of an image decide.
            n = max(row.n for row in self.rows)
            right = by_worst_points([clean, *(row for row in self.rows if row.n == n)], n).right == clean.n_eval
            points = {index: point for index, point in points.items() if not right[index]}
        return [(index, attack, image) for index, (_, attack, image) in sorted(points.items())]


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
    _clean: dict[Variant, Row] = field(default_factory=dict, init=False)
    _targets: dict[int, CountedModel] = field(default_factory=dict, init=False)

    def clean(self, variant: Variant) -> Row:
        """The row of the clean images."""

        def make() -> Row:
            begin = time.monotonic()
            judged = self.subject.judge(self.subject.x, variant, "judge")
            row = self.new_row(judged.right, attack=clean_name(variant), kind="clean", variant=variant)
            row.nonfinite_predictions = judged.nonfinite
            if self.chooses(variant):
                chosen = self.subject.judge(self.subject.x, variant, "choose")
                row.wrong, row.margins = chosen.wrong, chosen.margins
            row.seconds = time.monotonic() - begin
            return row

        if variant not in self._clean:
            settings = {"clean": variant, "n_eval": self.subject.judges(variant)}
            self._clean[variant] = self.load_or_make(settings, [], make)
        return self._clean[variant]

    def judging(self, variant: Variant) -> float:
        """The seconds that a judgement of attacked images takes at most: clean images were judged in the same way."""
        # A deterministic model also predicts attacked images twice, to see whether it draws random numbers for them.
        return self.clean(variant).seconds * (1 if self.subject.is_random else 3)

    def attacked(self, spec: AttackSpec, standing: Standing, earlier: Sequence[Row]) -> list[Row]:
        """The row of an attack, and if it is not on the deployed model, a row that tries its images on that model.

        On a random model, ``earlier`` are the rows of earlier attacks on the deployed model.
        """
        left = standing.left if spec.survivors_only else self.withstood(self.clean(spec.variant))
        # With a judge all images: the judge (the authors' model) may be right where the defence is wrong.
        alive = (left if spec.judge is None else np.ones_like(left))[: spec.max_images]
        index = self.in_order(spec, torch.from_numpy(alive.copy()).nonzero()[:, 0], standing.margins)
        images: dict[str, Any] = {"alive": digest(torch.from_numpy(alive)), "order": digest(index)}
        near = None
        if spec.nearest is not None:
            near = NearestRule(standing.margins[index.numpy()].tolist(), standing.gain)
            images["near"] = near.margins, near.gain
        if earlier and spec.survivors_only:
            known = by_worst_points(earlier, min(row.n for row in earlier))
            images["known"] = digest(*map(torch.from_numpy, known))
        settings, name = settings_of(spec, self.subject, self.context), row_name(spec, self.context)
        points = [self.clean("random"), *earlier]
        # The attack runs once for both rows, or not at all if both are in the cache.
        search = functools.cache(functools.partial(self.attack, spec, index, near))
        rows = list[Row]()
        for variant in dict.fromkeys([spec.variant] if spec.judge is not None else [spec.variant, "random"]):
            if rows:
                name += ", tried on the deployed defence"
                on = f"{settings['target']}, {VARIANTS_APART[spec.variant]}"
                settings = settings | {"variant": variant, "n_eval": self.subject.judges(variant), "target": on}
            make = functools.partial(self.judged, search, settings, alive, points)
            row = self.load_or_make(settings | images, [spec], make)
            # The key of a cached row does not contain the row's name, so it may have been made under another name.
            row.attack = name
            rows.append(row)
        self.progress.next_row()
        return rows

    def in_order(self, spec: AttackSpec, index: Tensor, margins: np.ndarray) -> Tensor:
        """Return the indices of the images that an attack gets, int64, in the order in which they are attacked."""
        if spec.nearest is not None:
            return by_margin(index, margins)[: spec.nearest]
        if spec.until is not None:
            return nearest_first(index, margins, self.subject.seed + spec.seed)
        return index

    def load_or_make(self, settings: dict[str, Any], specs: Sequence[AttackSpec], make: Callable[[], Row]) -> Row:
        """Read the row with these settings from the cache, or make the row and cache it."""
        subject, context = self.subject, self.context
        attacks = [[spec.attack.kind, spec.attack.revision(), *spec.attack.identity()] for spec in specs]
        whole = {
            "data": subject.data,
            "seed": subject.seed,
            "classes": subject.num_classes,
            # The draws of a random model for an image depend on how the images are divided into batches.
            "batches": [context.batch_size, context.max_forward_batch] if subject.is_random else [],
            "judges": [context.judge_draws, context.judge_share, subject.choosing],
            "attacks": attacks,
            "settings": settings,
        }
        # The row of an attack without a revision is not cached, because nothing would show a change of the attack.
        named = all(revision is not None for _, revision, *_ in attacks)
        models = [subject.model, *([spec.other_model for spec in specs] or [None]), *map(own_code, specs)]
        row = self.cache.row(self.cache.key(whole, *models) if named else None, make)
        # The following fields are not a part of the key, so they are also set for a cached row.
        row.model = self.name
        row.threat = threat_name(specs[0], context) if specs else None
        row.deterministic = not subject.is_random
        # Missing gradients are no reason for doubt if every image fell.
        row.reliable = row.reliable or bool((row.share_wrong == 1).all())
        return row

    def attack(self, spec: AttackSpec, index: Tensor, nearest: NearestRule | None) -> tuple[AttackRun, AttackedBatch]:
        """Run an attack on some of the images."""
        rule: StoppingRule | NearestRule | None = nearest
        if nearest is None and spec.until is not None:
            rule = StoppingRule(spec.until, len(index), len(self.subject.y))
        job = AttackJob(self.attacks.index(spec), index, rule)
        with self._run(job) as run:
            left = self.subject.deadline.until - time.monotonic()
            self.shards.from_first(lambda: job._replace(draws_differ=run.context.draws_differ, left=left))
            with self.progress.row(row_name(spec, self.context), len(index)):
                sums = run.sums(self.shards, self.progress.reach)
        sums.images = sums.images[: spec.max_images]
        return run, sums

    def follow(self) -> str:
        """In another process than the first: make a part of all batches; return the report of the first process."""
        job = self.shards.follow()
        while isinstance(job, AttackJob):
            with self._run(job) as run:
                self.subject.deadline.begin(time.monotonic() + job.left)
                job = self.shards.follow(run.make)
                self.subject.deadline.begin()
        return str(job)

    @contextlib.contextmanager
    def _run(self, job: AttackJob) -> Iterator[AttackRun]:
        """A context with the run of an attack, in which the model is in the attack's variant."""
        spec, subject = self.attacks[job.attack], self.subject
        subject.reseed("attack")
        target = target_of(spec, self.subject)
        with subject.variant(spec.variant), frozen(target):
            # Some aggregations give infinite logits, which hide differences, and some models draw only for attacked
            # images: the draws are then taken as different.
            may_hide, asked = subject.is_random and spec.variant == "random", subject.deadline.watch(target)
            hidden = may_hide and (subject.draws or not asked(subject.sample_images()).isfinite().all())
            # Every process makes this test, whose draws must leave all random generators in the same state.
            varies = hidden or subject.answers_vary(asked, elsewhere=subject.is_random)
            context = replace(
                self.context,
                draws_differ=varies if job.draws_differ is None else job.draws_differ,
                gradients_from=None if spec.gradients_from is None else self._counted(spec.gradients_from),
                seed=subject.seed + spec.seed,
            )
            counted = self._counted(target)
            rule = None if context.draws_differ else job.rule
            yield AttackRun(spec, counted, job.images, subject, context, rule=rule)

    def _counted(self, model: Classifier) -> CountedModel:
        """The counter around a model: a single one for each model, because a captured step belongs to it."""
        return self._targets.setdefault(id(model), counted_model(model, self.progress))

    # -- the judgement of attacked images, by new predictions ----------------------------------------------------------

    def chooses(self, variant: Variant) -> bool:
        """Return True if other draws choose points than judge them: only for a random model as deployed."""
        return variant == "random" and self.subject.is_random

    def withstood(self, row: Row) -> np.ndarray:
        """Tell which images have not fallen, bool ``[n]``."""
        if row.wrong is None:
            return row.robust
        return ~has_fallen(torch.from_numpy(row.wrong), self.context.judge_share).numpy()

    def new_row(self, right: np.ndarray, **values: Any) -> Row:
        """Make a row from predictions."""
        subject, several = self.subject, len(right) > 1
        return Row(
            model=self.name,
            robust=np.asarray(right.all(0)),
            right=right.sum(0) if several else None,
            of_draws=right.mean(1).tolist() if subject.draws_once_per_call and several else [],
            n_eval=len(right),
            seed=subject.seed,
            data=subject.data,
            **values,
        )

    def judged(
        self,
        search: Callable[[], tuple[AttackRun, AttackedBatch]],
        settings: dict[str, Any],
        alive: np.ndarray,
        points: Sequence[Row],
    ) -> Row:
        """Judge the images of an attack, and make the row."""
        run, sums = search()
        begin, spec, variant = time.perf_counter(), run.spec, settings["variant"]
        target, retest = spec.other_model if spec.target is None else spec.target, variant != spec.variant
        self.subject.check_repeats(sums.images[run.index], variant)
        judged = self.subject.judge(sums.images, variant, "judge", spec.judge)
        # The number of draws is recorded here, because it is 1 if the target turned out to be deterministic.
        draws = {name: value for name, value in spec.attack.settings(run.context).items() if name == "eot_iter"}
        stopped: dict[str, Any] = {}
        if CUT in sums.warnings:
            # Nothing bounds how many of the images would fall to a whole search.
            stopped = {"unsearched": len(run.index) - run.reached, "may_hold": float(len(run.index))}
        elif run.rule is not None:
            stopped = {"unsearched": run.rule.unsearched, "may_hold": run.rule.may_hold}
        row = self.new_row(
            # On a deterministic model, images outside `alive` are misclassified or have fallen, and count as fallen.
            judged.right & alive,
            attack="",
            kind=spec.attack.kind if spec.judge is None else AUTHORS,
            variant=variant,
            health=None if retest else counts_of(sums.health),
            reliable=sums.health.reliable,
            settings=settings | draws,
            attacked=len(run.index),
            warnings=sums.warnings,
            may_end_early=spec.attack.may_end_early(run.context),
            uses_gradients=spec.attack.uses_gradients,
            **stopped,
            # A model that differs only in the aggregation of its samples is not taken as another model.
            transferred=retest or (target is not None and not isinstance(target, WithAggregation)),
            nonfinite_predictions=judged.nonfinite,
            margins=judged.margins,
        )
        shown = fallen = run.index[torch.from_numpy(~judged.right.all(0))[run.index]]
        if spec.judge is None and self.chooses(variant):
            shown = self._choose_points(row, judged, run, sums.images, points)
        row.examples = self._examples(run.index, shown, sums.images, judged)
        if row.deployed and row.is_attack:
            row.fallen, row.fallen_images = fallen.numpy(), sums.images[fallen].cpu().numpy()
        row.seconds = time.perf_counter() - begin + (0 if retest else sums.seconds)
        return row

    def _choose_points(
        self, row: Row, judged: Judgement, run: AttackRun, images: Tensor, points: Sequence[Row]
    ) -> Tensor:
        n, index = len(images), run.index
        clean = Worst.of_row(points[0], n)
        own = Worst(clean.wrong.copy(), clean.margins.copy(), judged.right.sum(0))
        if len(index):
            chosen = self.subject.judge(images[index], "random", "choose", index=index)
            own.wrong[index.numpy()], own.margins[index.numpy()] = chosen.wrong, chosen.margins
        known = by_worst_points(points, n)
        row.of_draws = judged.right.mean(1).tolist() if row.of_draws else []
        row.count(known.or_worse(own) if run.spec.survivors_only else own)
        return index[torch.from_numpy(own.wrong > 0.5)[index]]

    def _examples(self, index: Tensor, fallen: Tensor, images: Tensor, judged: Judgement) -> Examples | None:
        """Select the images that a page shows: some of the fallen images, or some others if no image fell."""
        subject, shown = self.subject, (fallen if len(fallen) else index)[:EXAMPLES]
        if len(shown) == 0:
            return None
        return Examples(
            clean=subject.x[shown].cpu().numpy(),
            adversarial=images[shown].cpu().numpy(),
            labels=subject.y[shown.to(subject.y.device)].cpu().numpy(),
            fell=np.full(len(shown), len(fallen) > 0),
            predicted=judged.classes[shown.numpy()],
        )


def target_of(spec: AttackSpec, subject: Subject) -> Classifier:
    """The model that an attack attacks."""
    model = subject.base_model
    if spec.aggregation is not None:
        return WithAggregation(model, spec.aggregation)  # type: ignore[arg-type]  # a model with sample_logits
    if spec.gradients_from is not None:
        return subject.judged_model(spec.variant)
    if spec.target == CLASSIFIER and has_classifier(model):
        return classifier_of(model)
    if callable(spec.target):
        return spec.target
    model = model if spec.judge is None else spec.judge
    view = spec.attack.target(model)
    return subject.judged_model(spec.variant) if spec.judge is None and view is model else view


def own_code(spec: AttackSpec) -> object:
    """The function or the class that a user wrote for an attack; None for an attack of this package."""
    if isinstance(spec.attack, FunctionAttack):
        return spec.attack.function
    return type(spec.attack) if is_users(type(spec.attack).__module__) else None


def settings_of(spec: AttackSpec, subject: Subject, context: JudgeContext) -> dict[str, Any]:
    """The settings of an attack, in plain values, on which its row depends."""
    target = spec.other_model if spec.target is None else spec.target
    on = "defence" if target is None else NOT_ADAPTIVE if target == CLASSIFIER else type(target).__name__
    optional = {
        "aggregation": spec.aggregation,
        "seed": spec.seed or None,
        "gradients_from": None if spec.gradients_from is None else on,
        "judge": None if spec.judge is None else type(spec.judge).__name__,
        "published": spec.published,
        "until": None if spec.until is None else [spec.until, STOPPING],
        "nearest": None if spec.nearest is None else [spec.nearest, GROUP],
    }
    return spec.attack.settings(context) | {
        "variant": spec.variant,
        "target": on,
        "max_images": spec.max_images,
        "survivors_only": spec.survivors_only,
        "n_eval": subject.judges(spec.variant) if spec.judge is None else 1,
        **{name: value for name, value in optional.items() if value is not None},
    }
