"""The rows of an evaluation, made or read from the folder that keeps them: attack, judge, count."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._tensors import digest
from ..attacks import Attack, AttackContext, AttackersHead, AutoAttack, GradientHealth, frozen
from ..attacks.bpda import classifier_of
from ..attacks.engine.rows import Judge, has_fallen
from ..defences.stochastic import WithAggregation
from ..protocols import Classifier, has_classifier
from .cache import AttackedBatch, PartialRow, RowCache
from .plan import ALONE, clean_name, row_name, threat_name
from .progress import CountedModel, Progress, counted_model
from .rows import AUTHORS, VARIANTS_APART, Examples, Row
from .specs import CLASSIFIER, AttackSpec, check_adversarial
from .stopping import REVISION as STOPPING
from .stopping import StoppingRule, nearest_first
from .subject import Judgement, Subject, Variant
from .team import Task, Team

#: Attacked images kept with each row, for the pictures.
EXAMPLES = 8
#: What `GradientHealth` counts.
COUNTS = ("gradients", "nonfinite", "zero", "images", "unmoved")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of an attack, before it is judged.

    Args:
        spec: the attack.
        index: which of the images were attacked, int64.
        sums: all images, attacked or not, and health and time over the batches.
        settings: what is known of the attack's settings only after it.
    """

    spec: AttackSpec
    index: Tensor
    sums: AttackedBatch
    settings: dict[str, Any]


class Measure:
    """Makes the rows of one call of `evaluate`.

    Args:
        subject: what is attacked.
        context: what the attacks are told.
        name: of the model.
        cache: the finished rows.
        progress: counts and shows.
        team: the processes that make the rows.
        keep_all: whether rows keep every image that fell, and not only some for the pictures.

    Attributes:
        attacks: all of the evaluation, in the same order in every process.
    """

    def __init__(
        self,
        subject: Subject,
        context: AttackContext,
        name: str,
        *,
        cache: RowCache,
        progress: Progress,
        team: Team,
        keep_all: bool = False,
    ):
        self.subject, self.context, self.name = subject, context, name
        self.cache, self.progress, self.team, self.keep_all = cache, progress, team, keep_all
        self.attacks: list[AttackSpec] = []
        self._clean: dict[Variant, Row] = {}
        self._targets: dict[int, CountedModel] = {}
        # the last one, whose images may be tried on another variant
        self._search: Outcome | None = None

    def turn_to(self, subject: Subject) -> None:
        """Go on with other images of the same model."""
        self.subject, self._clean, self._search = subject, {}, None

    def clean(self, variant: Variant) -> Row:
        """The row of the clean images."""
        if variant not in self._clean:
            settings = {"clean": variant, "n_eval": self.subject.judges(variant)}
            self._clean[variant] = self._row(settings, None, lambda _: self._measure_clean(variant))
        return self._clean[variant]

    def attacked(self, spec: AttackSpec, left: np.ndarray, margins: np.ndarray) -> Row:
        """One attack's row.

        Args:
            spec: the attack.
            left: bool ``[n]``, which images earlier attacks on the variant left right.
            margins: the least margins that they reached, ``[n]``; infinite where there is none.
        """
        alive = self._alive(spec, spec.variant, left)
        if spec.judge is not None:
            # what the defence gets wrong, its authors' model may get right
            alive = np.ones_like(alive)
        index = self.in_order(spec, torch.from_numpy(alive.copy()).nonzero()[:, 0], margins)
        settings = self.settings_of(spec) | {"attacked": len(index)}
        images = {"alive": digest(torch.from_numpy(alive)), "order": digest(index)}
        row = self._row(settings | images, spec, functools.partial(self._measure_attack, spec, alive, index, settings))
        # no part of the key: the same attack by any name
        row.attack = row_name(spec, self.context)
        self.progress.next_row()
        return row

    def tried(self, spec: AttackSpec, left: np.ndarray, left_deployed: np.ndarray) -> Row:
        """The row of the images of an attack on a variant, judged by the deployed model in fresh draws.

        Args:
            spec: the attack.
            left: bool ``[n]``, which images earlier attacks on the variant left right.
            left_deployed: bool ``[n]``, which images earlier rows left right of the deployed model.
        """
        alive, standing = self._alive(spec, spec.variant, left), self._alive(spec, "random", left_deployed)
        attacked = self.settings_of(spec)
        settings = attacked | {
            "variant": "random",
            "attacked": int((alive & standing).sum()),
            "n_eval": self.subject.judges("random"),
            "target": f"{attacked['target']}, {VARIANTS_APART[spec.variant]}",
        }
        images = {"alive": digest(torch.from_numpy(alive)), "standing": digest(torch.from_numpy(standing))}

        def make(unfinished: PartialRow) -> Row:
            # its images are gone where the attack's own row was kept by an earlier run
            search, self._search = self._search, None
            if search is None or search.spec is not spec:
                search = self.attack(spec, torch.from_numpy(alive).nonzero()[:, 0], unfinished)
            begin = time.perf_counter()
            judged = self.subject.judge(search.sums.images, "random", "judge")
            # an image falls only by what the attack made of it
            row = self._judged(search, settings, judged, (judged.right | ~alive) & standing, alive & standing)
            row.transferred = True
            row.seconds = time.perf_counter() - begin
            return row

        row = self._row(settings | images, spec, make)
        row.attack = f"{row_name(spec, self.context)}, tried on the deployed defence"
        return row

    def in_order(self, spec: AttackSpec, index: Tensor, margins: np.ndarray) -> Tensor:
        """The images that an attack searches, int64, in its order.

        Args:
            spec: the attack.
            index: the images that it is given, int64.
            margins: the least margins that other attacks reached, of all images, ``[n]``.
        """
        if spec.nearest is not None:
            reached = torch.from_numpy(margins)[index].nan_to_num(nan=math.inf)
            return index[reached.argsort(stable=True)[: spec.nearest]]
        if spec.until is not None:
            return nearest_first(index, margins, self.subject.first, self.subject.seed + spec.seed)
        return index

    def _alive(self, spec: AttackSpec, variant: Variant, left: np.ndarray) -> np.ndarray:
        """Which of its images an attack is given, of those that a variant classifies correctly."""
        return (left if spec.survivors_only else self.clean(variant).robust)[: self._most(spec)]

    def _most(self, spec: AttackSpec) -> int | None:
        """Of the present images, how many an attack is about at most."""
        return None if spec.max_images is None else max(0, spec.max_images - self.subject.first)

    def settings_of(self, spec: AttackSpec) -> dict[str, Any]:
        """What is run, in plain values."""
        target = spec.other_model if spec.target is None else spec.target
        on = "defence" if target is None else ALONE if target == CLASSIFIER else type(target).__name__
        optional = {
            # BPDA has an aggregation among its own options
            "aggregation": spec.aggregation,
            "seed": spec.seed or None,
            "gradients_from": None if spec.gradients_from is None else on,
            "judge": None if spec.judge is None else type(spec.judge).__name__,
            "published": spec.published,
            "until": None if spec.until is None else [spec.until, STOPPING],
            "nearest": spec.nearest,
        }
        return spec.resolved.settings(self.context) | {
            "variant": spec.variant,
            "target": on,
            "max_images": spec.max_images,
            "survivors_only": spec.survivors_only,
            "n_eval": self.subject.judges(spec.variant) if spec.judge is None else 1,
            **{name: value for name, value in optional.items() if value is not None},
        }

    def _row(self, settings: dict[str, Any], spec: AttackSpec | None, make: Callable[[PartialRow], Row]) -> Row:
        """The row of these settings, of an attack or of the clean images, from the cache if it has it."""
        row = self.kept(settings, spec, make)
        row.threat = None if spec is None else threat_name(spec, self.context)
        return row

    def kept(
        self,
        settings: dict[str, Any],
        specs: AttackSpec | Sequence[AttackSpec] | None,
        make: Callable[[PartialRow], Row],
    ) -> Row:
        """The row of these settings from the cache if it has it; made and kept if not.

        Args:
            settings: what is run, in plain values.
            specs: the attack, or several; None: the clean images.
            make: makes the row; is given the batches that an interrupted run finished.
        """
        subject, context = self.subject, self.context
        key: str | None = None
        several = [specs] if isinstance(specs, AttackSpec) else list(specs or ())
        attacks = [[spec.resolved.kind, spec.resolved.revision(), *spec.resolved.identity()] for spec in several]
        # rows of an attack that names no revision are not kept
        if all(attack[1] is not None for attack in attacks):
            whole = {
                "data": subject.data,
                "seed": subject.seed,
                "classes": subject.num_classes,
                # which image gets which draws depends on them
                "batches": _batches_of(settings, context) if subject.is_random else [],
                "attack": None if specs is None else attacks[0] if isinstance(specs, AttackSpec) else attacks,
                "settings": settings,
            }
            whole |= {"first": subject.first} if subject.first else {}
            whole |= {"keep": "all"} if self.keep_all and specs is not None else {}
            if context.judge_share < 1:
                whole["judges"] = [context.judge_draws, context.judge_share]
            key = self.cache.key(whole, subject.model, *([spec.other_model for spec in several] or [None]))
        row = self.cache.row(key, make)
        # these are no part of the key
        row.model = self.name
        row.settings["deterministic"] = not self.subject.is_random
        # an attack that left nothing lacked nothing
        row.reliable = row.reliable or not row.robust.any()
        return row

    def _measure_clean(self, variant: Variant) -> Row:
        begin = time.perf_counter()
        judged = self.subject.judge(self.subject.x, variant, "clean")
        return self._new_row(
            judged,
            judged.right,
            attack=clean_name(variant),
            kind="clean",
            variant=variant,
            robust=judged.right[0],
            seconds=time.perf_counter() - begin,
        )

    def _new_row(self, judged: Judgement, right: np.ndarray, **fields: Any) -> Row:
        """A row of the model's predictions, of which these are right."""
        return Row(
            model=self.name,
            mean=float(right.mean()),
            worst=float(right.all(0).mean()),
            n_eval=len(right),
            seed=self.subject.seed,
            data=self.subject.data,
            nonfinite_predictions=judged.nonfinite,
            **fields,
        )

    def attack(self, spec: AttackSpec, index: Tensor, unfinished: PartialRow, begin: Tensor | None = None) -> Outcome:
        """Run an attack on the images that it is given.

        Args:
            spec: the attack.
            index: the images that it is given, int64, in the order in which it searches them.
            unfinished: has the batches that an interrupted run finished.
            begin: where the search begins, ``[N, C, H, W]``; None: as the attack says.
        """
        attack, team = spec.resolved, self.team
        kept = team.folder(unfinished, self.cache.folder)
        with self._batches(spec, index, kept, begin) as batches:
            context = batches.context
            # of a target that predicts the same every time one draw is enough
            settings = {name: value for name, value in attack.settings(context).items() if name == "eot_iter"}
            cost = attack.cost(context)
            total = None if cost is None else cost * sum(map(len, batches.parts))
            with self.progress.row(row_name(spec, self.context), total):
                if team.world > 1 and batches.missing(range(len(batches.parts))):
                    assert kept.folder is not None
                    if begin is not None:
                        kept.begin(begin)
                    task = Task(
                        attack=self.attacks.index(spec), first=self.subject.first, data=self.subject.data,
                        images=index.numpy().tobytes(), batches=[], folder=str(kept.folder.resolve()),
                        draws_differ=context.draws_differ, begins=begin is not None,
                    )  # fmt: skip
                    sums = batches.sums(
                        lambda missing: team.share(task._replace(batches=missing), batches.make, self.progress),
                        team.world,
                    )
                else:
                    sums = batches.sums()
        if kept is not unfinished:
            kept.remove()
        if sums.warnings or isinstance(attack, AutoAttack):
            settings["warnings"] = sums.warnings
        if sums.fallen:
            settings["fallen to"] = sums.fallen
        if sums.proved:
            settings["proved robust"] = sums.proved
        if batches.rule is not None:
            settings |= {"unsearched": batches.rule.unsearched, "may hold": batches.rule.may_hold}
        sums.images = sums.images[: self._most(spec)]
        return Outcome(spec, index, sums, settings)

    def help(self, task: Task) -> None:
        """Make some batches of an attack for the first process.

        Args:
            task: the batches, of images that the measure has.

        Raises:
            ValueError: they are other images than the first process has, or it keeps batches where this one cannot see.
        """
        mine = self.team.taken(task, self.progress)
        first = next(mine, None)
        if first is None:
            return
        if task.data != self.subject.data:
            raise ValueError(
                f"process {self.team.rank} has other images than the first from number {task.first} on: all processes "
                "of a group must read the same images in the same order"
            )
        kept = PartialRow(Path(task.folder))
        self.team.check_folder(Path(task.folder))
        spec, index = self.attacks[task.attack], torch.frombuffer(bytearray(task.images), dtype=torch.int64)
        begin = kept.begin() if task.begins else None
        with self._batches(spec, index, kept, begin, task.draws_differ) as batches:
            for number in itertools.chain([first], mine):
                batches.make(number)

    @contextlib.contextmanager
    def _batches(
        self,
        spec: AttackSpec,
        index: Tensor,
        kept: PartialRow,
        begin: Tensor | None,
        draws_differ: bool | None = None,
    ) -> Iterator[Batches]:
        """What an attack is run on, batch by batch, with the model as the attack's variant has it within the block.

        Args:
            spec: the attack.
            index: the images that it is given, int64, in the order in which it searches them.
            kept: keeps the batches.
            begin: where the search begins.
            draws_differ: whether the target differs from call to call; None: that is tried.
        """
        subject = self.subject
        subject.reseed("attack")
        target = self._target(spec)
        with subject.variant(spec.variant), frozen(target):
            # tried in every process, for the draws that it takes
            tried = self._draws_differ(spec, target)
            context = dataclasses.replace(
                self.context,
                draws_differ=tried if draws_differ is None else draws_differ,
                gradients_from=spec.gradients_from,
                seed=subject.seed + spec.seed,
                begin=begin,
            )
            counted = self._targets.setdefault(id(target), counted_model(target, self.progress))
            rule = None
            if spec.until is not None and not context.draws_differ:
                rule = StoppingRule(spec.until, len(index), len(subject.y))
            yield Batches(spec.resolved, counted, index, subject=subject, context=context, kept=kept, rule=rule)

    def _measure_attack(
        self, spec: AttackSpec, alive: np.ndarray, index: Tensor, settings: dict[str, Any], unfinished: PartialRow
    ) -> Row:
        search = self.attack(spec, index, unfinished)
        self._search = None if spec.variant == "random" else search
        begin = time.perf_counter()
        judged = self.subject.judge(search.sums.images, spec.variant, "judge", spec.judge)
        # what was not attacked, because earlier attacks broke it, counts as lost
        row = self._judged(search, settings, judged, judged.right & alive, alive)
        health = search.sums.health
        row.health = health if health["gradients"] else None
        target = spec.other_model if spec.target is None else spec.target
        # another aggregation of the same samples is the same model
        row.transferred = target is not None and not isinstance(target, (WithAggregation, AttackersHead))
        row.seconds = search.sums.seconds + time.perf_counter() - begin
        return row

    def _judged(
        self, search: Outcome, settings: dict[str, Any], judged: Judgement, right: np.ndarray, given: np.ndarray
    ) -> Row:
        """The row of an attack's images, from the predictions that count; given: the images that can fall here."""
        shown = _shown(search.index, judged, given if self.keep_all else None)
        return self._new_row(
            judged,
            right,
            attack=row_name(search.spec, self.context),
            kind=search.spec.resolved.kind if search.spec.judge is None else AUTHORS,
            variant=settings["variant"],
            robust=np.asarray(right.all(0)),
            seconds=0.0,
            reliable=GradientHealth(dict(search.sums.health)).reliable,
            settings=settings | search.settings,
            examples=_examples(self.subject, search.sums.images, *shown, judged, self.keep_all),
            margins=judged.margins,
        )

    def _target(self, spec: AttackSpec) -> Classifier:
        """What the attack runs on."""
        model = self.subject.single
        if spec.aggregation is not None:
            return WithAggregation(model, spec.aggregation)  # type: ignore[arg-type]  # a model with sample_logits
        if spec.gradients_from is not None:
            return self.subject.of(spec.variant)
        if spec.target == CLASSIFIER and has_classifier(model):
            return classifier_of(model)
        if spec.other_model is not None:
            return spec.other_model
        view = spec.resolved.target(model)
        return self.subject.of(spec.variant) if view is model else view

    def _draws_differ(self, spec: AttackSpec, target: Classifier) -> bool:
        """Whether the target predicts something else every time. Within the variant's block."""
        subject = self.subject
        # an aggregation that is infinite everywhere hides the draws behind it
        hidden = subject.is_random and spec.variant == "random" and not target(subject.some()).isfinite().all()
        return hidden or subject.draws(target)


def _shown(index: Tensor, judged: Judgement, given: np.ndarray | None) -> tuple[Tensor, bool]:
    """The images that a row keeps, int64, and whether they fell; where none did, some that withstood the attack.

    Args:
        index: the images that were attacked.
        judged: the predictions on all images.
        given: bool ``[n]``, the images that can fall, where all that did are kept; None: some are kept.
    """
    wrong = torch.from_numpy(~judged.right.all(0))
    if given is None:
        fallen = index[wrong[index]][:EXAMPLES]
    else:
        # an image that was not attacked falls too, by the draws of a random model
        wrong &= torch.from_numpy(given)
        others = torch.ones_like(wrong).index_fill(0, index, False)
        fallen = torch.cat([index[wrong[index]], (wrong & others).nonzero()[:, 0]])
    return (fallen, True) if len(fallen) else (index[:EXAMPLES], False)


def _examples(
    subject: Subject, adversarial: Tensor, shown: Tensor, fell: bool, judged: Judgement, numbered: bool
) -> Examples | None:
    """Attacked images for the pictures, and as witnesses."""
    if len(shown) == 0:
        return None
    return Examples(
        clean=subject.x[shown].cpu().numpy(),
        adversarial=adversarial[shown].cpu().numpy(),
        labels=subject.y[shown.to(subject.y.device)].cpu().numpy(),
        fell=np.full(len(shown), fell),
        predicted=judged.classes[shown.numpy()],
        index=shown.numpy() + subject.first if numbered else None,
    )


def _batches_of(settings: dict[str, Any], context: AttackContext) -> list[Any]:
    """The settings on which it depends which image gets which draws."""
    # there was a time when a batch went on with the random numbers of the one before it
    seeds = ["a seed each"] if settings.get("attacked", 0) > (context.batch_size or 0) else []
    return [context.batch_size, context.max_forward_batch, *seeds]


# -- one attack, batch by batch ---------------------------------------------------------------------------------------


class Batches:
    """The batches of an attack, each of which can be made without the others.

    Random starts are tied to an image's index, so that of a model that predicts the same every time the batches do not
    matter. For a random one each batch has a seed of its own.

    Args:
        attack: the attack.
        target: what it runs on.
        index: the images, int64.
        subject: brings them.
        context: what the evaluation tells the attack.
        kept: keeps the batches, and has those that an interrupted run or another process finished.
        rule: decides after each batch whether the attack stops; None: every batch is made.
    """

    def __init__(
        self,
        attack: Attack,
        target: Classifier,
        index: Tensor,
        *,
        subject: Subject,
        context: AttackContext,
        kept: PartialRow,
        rule: StoppingRule | None = None,
    ):
        self.attack, self.target, self.kept, self.rule = attack, target, kept, rule
        self.subject, self.context = subject, context
        most = context.batch_size or len(index)
        self.parts = index.split(most if rule is None else min(most, rule.round)) if len(index) else ()

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of some batches, by their numbers, that are still to be made."""
        return [number for number in numbers if self.kept.read(self.parts[number]) is None]

    def make(self, number: int) -> AttackedBatch:
        """Attack the images of a batch, and keep it.

        Args:
            number: of the batch.

        Raises:
            TypeError: the attack returned no tensor.
            ValueError: the attack returned what it was not allowed to return (`check_adversarial`).
        """
        part = self.parts[number]
        if self.context.graphs is not None:
            self.context.graphs.to_come = sum(map(len, self.parts[number + 1 :])) / len(part)
        self.subject.reseed_batch(number)
        batch = _attack(self.attack, self.target, part, self.subject, self.context)
        if self.rule is not None:
            batch.fell = self.subject.room.within(functools.partial(self._fallen, part, batch.images))
        self.kept.keep(part, batch)
        return batch

    def _fallen(self, part: Tensor, images: Tensor) -> list[int]:
        """Which attacked images the model misclassifies, as 0 and 1."""
        subject = self.subject
        judge = Judge(self.target, max_forward_batch=subject.room.limit(self.context.max_forward_batch))
        return has_fallen(judge.shares(images.to(subject.device), subject.y[part].to(subject.device))).int().tolist()

    def sums(self, share: Callable[[list[int]], None] | None = None, at_once: int = 1) -> AttackedBatch:
        """All the images, attacked in the places of the index, with the sums over the batches up to the last one made.

        Args:
            share: has some batches, by their numbers, made by several processes; None: this one makes all.
            at_once: so many batches are shared before the rule is asked; without a rule, all of them are. A batch that
                was made although the rule stops before it is left out: the rows are those of one process.
        """
        sums = AttackedBatch(self.subject.x.clone(), {}, 0.0)
        health, fallen = Counter(dict.fromkeys(COUNTS, 0)), Counter[str]()
        step = at_once if self.rule is not None else len(self.parts)
        for number, part in enumerate(self.parts):
            if share is not None and number % step == 0:
                missing = self.missing(range(number, min(number + step, len(self.parts))))
                if missing:
                    share(missing)
            batch = self.kept.read(part) or self.make(number)
            sums.images[part] = batch.images.to(self.subject.x.device)
            sums.seconds += batch.seconds
            health.update(batch.health)
            fallen.update(batch.fallen)
            sums.proved += batch.proved
            sums.warnings += [text for text in batch.warnings if text not in sums.warnings]
            if self.rule is not None and self.rule.see([bool(fell) for fell in batch.fell], _no_evidence(batch)):
                break
        sums.health, sums.fallen = dict(health), dict(fallen)
        return sums


def _no_evidence(batch: AttackedBatch) -> int:
    """How many images that withstood say nothing about others: all where the attack lacked gradients."""
    usable = not batch.health["gradients"] or GradientHealth(dict(batch.health)).reliable
    return batch.stood_still if usable else len(batch.fell)


def _attack(
    attack: Attack, target: Classifier, part: Tensor, subject: Subject, context: AttackContext
) -> AttackedBatch:
    begin = time.perf_counter()
    x, y, ids = (tensor.to(subject.device) for tensor in (subject.x[part], subject.y[part], part + subject.first))

    def search() -> tuple[Tensor, AttackContext, GradientHealth]:
        health = GradientHealth()
        begin = None if context.begin is None else context.begin[part].to(subject.device)
        told = dataclasses.replace(
            context, sample_ids=ids, begin=begin, health=health, warnings=[], fell_to={}, stood_still=[], proved=[],
            max_forward_batch=subject.room.limit(context.max_forward_batch),
        )  # fmt: skip
        # the attack gets a copy, so that what it does to the images cannot hide how far it went
        return attack.search(target, x.clone(), y, told), told, health

    graphs, device = context.graphs, subject.device
    images, told, health = subject.room.within(
        search if graphs is None else functools.partial(graphs.without_if_memory_ends, search, device)
    )
    check_adversarial(attack.name(context), images, x, attack.threat_model(context))
    counts = {name: health.count(name) for name in COUNTS}
    # when the images are there, the device has done its work
    found = images.detach().cpu()
    batch = AttackedBatch(found, counts, time.perf_counter() - begin)
    batch.warnings, batch.fallen, batch.stood_still = told.warnings, told.fell_to, sum(map(int, told.stood_still))
    batch.proved = sum(map(int, told.proved))
    return batch
