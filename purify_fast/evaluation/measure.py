"""Make the rows of an evaluation, or read them from the folder that keeps them: attack, judge, count."""

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
from ..attacks import Attack, AttackContext, AttackersHead, AttackResult, GradientHealth, frozen
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

#: Number of attacked images kept with each row, for the pictures.
EXAMPLES = 8
#: The counts of `GradientHealth`.
COUNTS = ("gradients", "nonfinite", "zero", "images", "unmoved")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of an attack, before it is judged.

    Args:
        spec: the attack.
        index: indices of the attacked images, int64.
        sums: all images, attacked or not, with health and time summed over the batches.
        settings: settings of the attack that are known only after it.
        found: the fields of a row that the attack decides.
    """

    spec: AttackSpec
    index: Tensor
    sums: AttackedBatch
    settings: dict[str, Any]
    found: dict[str, Any]


class Measure:
    """The rows of a call of `evaluate`.

    Args:
        subject: the attacked model.
        context: context of the attacks.
        name: name of the model.
        cache: the finished rows.
        progress: counts and shows.
        team: the processes that make the rows.
        keep_all: whether rows keep every fallen image, not only some for the pictures.

    Attributes:
        attacks: all attacks of the evaluation, in the same order in every process.
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
        # The images of the last attack may be tried on another variant.
        self._search: Outcome | None = None

    def turn_to(self, subject: Subject) -> None:
        """Continue with other images of the same model."""
        self.subject, self._clean, self._search = subject, {}, None

    def clean(self, variant: Variant) -> Row:
        """The row of the clean images."""
        if variant not in self._clean:
            settings = {"clean": variant, "n_eval": self.subject.judges(variant)}
            self._clean[variant] = self._row(settings, None, lambda _: self._measure_clean(variant))
        return self._clean[variant]

    def attacked(self, spec: AttackSpec, left: np.ndarray, margins: np.ndarray) -> Row:
        """The row of an attack.

        Args:
            spec: the attack.
            left: bool ``[n]``, which images earlier attacks on the variant left right.
            margins: the least margins that they reached, ``[n]``; infinite where there is none.
        """
        alive = self._alive(spec, spec.variant, left)
        if spec.judge is not None:
            # The authors' model may be right where the defence is wrong.
            alive = np.ones_like(alive)
        index = self.in_order(spec, torch.from_numpy(alive.copy()).nonzero()[:, 0], margins)
        settings = self.settings_of(spec)
        images = {"alive": digest(torch.from_numpy(alive)), "order": digest(index)}
        row = self._row(settings | images, spec, functools.partial(self._measure_attack, spec, alive, index, settings))
        # The key does not hold the name: it is the same attack by any name.
        row.attack = row_name(spec, self.context)
        self.progress.next_row()
        return row

    def tried(self, spec: AttackSpec, left: np.ndarray, left_deployed: np.ndarray) -> Row:
        """The row of a variant's attacked images, judged by the deployed model in fresh draws.

        Args:
            spec: the attack.
            left: bool ``[n]``, which images earlier attacks on the variant left right.
            left_deployed: bool ``[n]``, True for images that earlier rows left right for the deployed model.
        """
        alive, standing = self._alive(spec, spec.variant, left), self._alive(spec, "random", left_deployed)
        attacked = self.settings_of(spec)
        settings = attacked | {
            "variant": "random",
            "n_eval": self.subject.judges("random"),
            "target": f"{attacked['target']}, {VARIANTS_APART[spec.variant]}",
        }
        images = {"alive": digest(torch.from_numpy(alive)), "standing": digest(torch.from_numpy(standing))}

        def make(unfinished: PartialRow) -> Row:
            # If the attack's row was read from an earlier run, its images are not in memory.
            search, self._search = self._search, None
            if search is None or search.spec is not spec:
                search = self.attack(spec, torch.from_numpy(alive).nonzero()[:, 0], unfinished)
            begin = time.perf_counter()
            judged = self.subject.judge(search.sums.images, "random", "judge")
            # Only an image that was attacked can fall.
            row = self._judged(search, settings, judged, (judged.right | ~alive) & standing, alive & standing)
            row.attacked = int((alive & standing).sum())
            row.transferred = True
            row.seconds = time.perf_counter() - begin
            return row

        row = self._row(settings | images, spec, make)
        row.attack = f"{row_name(spec, self.context)}, tried on the deployed defence"
        return row

    def in_order(self, spec: AttackSpec, index: Tensor, margins: np.ndarray) -> Tensor:
        """The images that an attack searches, int64, in the order of the search.

        Args:
            spec: the attack.
            index: images given to the attack, int64.
            margins: the least margins that other attacks reached, of all images, ``[n]``.
        """
        if spec.nearest is not None:
            reached = torch.from_numpy(margins)[index].nan_to_num(nan=math.inf)
            return index[reached.argsort(stable=True)[: spec.nearest]]
        if spec.until is not None:
            return nearest_first(index, margins, self.subject.first, self.subject.seed + spec.seed)
        return index

    def _alive(self, spec: AttackSpec, variant: Variant, left: np.ndarray) -> np.ndarray:
        """Choose the images for an attack from those that a variant classifies correctly."""
        return (left if spec.survivors_only else self.clean(variant).robust)[: self._most(spec)]

    def _most(self, spec: AttackSpec) -> int | None:
        """The largest number of the present images that an attack covers."""
        return None if spec.max_images is None else max(0, spec.max_images - self.subject.first)

    def settings_of(self, spec: AttackSpec) -> dict[str, Any]:
        """The settings of an attack, in plain values."""
        target = spec.other_model if spec.target is None else spec.target
        on = "defence" if target is None else ALONE if target == CLASSIFIER else type(target).__name__
        optional = {
            # BPDA has an aggregation of its own among its options.
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
        """Read the row of these settings, of an attack or of the clean images, from the cache, or make it."""
        row = self.kept(settings, spec, make)
        row.threat = None if spec is None else threat_name(spec, self.context)
        return row

    def kept(
        self,
        settings: dict[str, Any],
        specs: AttackSpec | Sequence[AttackSpec] | None,
        make: Callable[[PartialRow], Row],
    ) -> Row:
        """Read the row of these settings from the cache, or make and keep it.

        Args:
            settings: settings in plain values.
            specs: the attack, or several; None: the clean images.
            make: makes the row from the batches that an interrupted run finished.
        """
        subject, context = self.subject, self.context
        key: str | None = None
        several = [specs] if isinstance(specs, AttackSpec) else list(specs or ())
        attacks = [[spec.resolved.kind, spec.resolved.revision(), *spec.resolved.identity()] for spec in several]
        # Rows of an attack without a revision are not kept.
        if all(attack[1] is not None for attack in attacks):
            whole = {
                "data": subject.data,
                "seed": subject.seed,
                "classes": subject.num_classes,
                # An image's draws depend on the batches.
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
        # These do not belong to the key.
        row.model = self.name
        row.deterministic = not self.subject.is_random
        # If no image survived, missing gradients do not matter.
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
        """A row of the model's predictions, given which are right."""
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
            index: images given to the attack, int64, in the order of the search.
            unfinished: holds the batches that an interrupted run finished.
            begin: start of the search, ``[N, C, H, W]``; None: the attack's own start.
        """
        attack, team = spec.resolved, self.team
        kept = team.folder(unfinished, self.cache.folder)
        with self._batches(spec, index, kept, begin) as batches:
            context = batches.context
            # A deterministic target needs one draw.
            settings = {name: value for name, value in attack.settings(context).items() if name == "eot_iter"}
            may_end_early = attack.may_end_early(context)
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
        found = {"warnings": sums.warnings, "fell_to": sums.fallen, "proved": sums.proved}
        if batches.rule is not None:
            found |= {"unsearched": batches.rule.unsearched, "may_hold": batches.rule.may_hold}
        sums.images = sums.images[: self._most(spec)]
        return Outcome(spec, index, sums, settings, found | {"may_end_early": may_end_early})

    def help(self, task: Task) -> None:
        """Make some batches of an attack for the first process.

        Args:
            task: the batches, all of images that the measure has.

        Raises:
            ValueError: the first process has other images, or keeps batches where this process cannot see them.
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
        """Within the block, the batches of an attack, with the model in the attack's variant.

        Args:
            spec: the attack.
            index: images given to the attack, int64, in the order of the search.
            kept: keeps the batches.
            begin: start of the search.
            draws_differ: whether the target differs from call to call; None: try it.
        """
        subject = self.subject
        subject.reseed("attack")
        target = self._target(spec)
        with subject.variant(spec.variant), frozen(target):
            # Every process tries it, since that takes random draws.
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
        # Images that were not attacked because earlier attacks broke them count as lost.
        row = self._judged(search, settings, judged, judged.right & alive, alive)
        health = search.sums.health
        row.health = health if health["gradients"] else None
        target = spec.other_model if spec.target is None else spec.target
        # Another aggregation of the same samples does not make another model.
        row.transferred = target is not None and not isinstance(target, (WithAggregation, AttackersHead))
        row.seconds = search.sums.seconds + time.perf_counter() - begin
        return row

    def _judged(
        self, search: Outcome, settings: dict[str, Any], judged: Judgement, right: np.ndarray, given: np.ndarray
    ) -> Row:
        """The row of an attack's images, from the predictions that count; ``given`` marks the images that can fall."""
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
            attacked=len(search.index),
            **search.found,
            examples=_examples(self.subject, search.sums.images, *shown, judged, self.keep_all),
            margins=judged.margins,
        )

    def _target(self, spec: AttackSpec) -> Classifier:
        """The target of the attack."""
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
        """Tell whether the target's predictions vary. Call it within the variant's block."""
        subject = self.subject
        # An aggregation that is infinite everywhere hides differences between draws.
        hidden = subject.is_random and spec.variant == "random" and not target(subject.some()).isfinite().all()
        return hidden or subject.draws(target)


def _shown(index: Tensor, judged: Judgement, given: np.ndarray | None) -> tuple[Tensor, bool]:
    """The images that a row keeps, int64, and whether they fell; if none did, some that withstood the attack.

    Args:
        index: the images that were attacked.
        judged: the predictions on all images.
        given: bool ``[n]``, images that can fall, if all fallen images are kept; None: some are kept.
    """
    wrong = torch.from_numpy(~judged.right.all(0))
    if given is None:
        fallen = index[wrong[index]][:EXAMPLES]
    else:
        # With a random model, an image that was not attacked may fall by its draws.
        wrong &= torch.from_numpy(given)
        others = torch.ones_like(wrong).index_fill(0, index, False)
        fallen = torch.cat([index[wrong[index]], (wrong & others).nonzero()[:, 0]])
    return (fallen, True) if len(fallen) else (index[:EXAMPLES], False)


def _examples(
    subject: Subject, adversarial: Tensor, shown: Tensor, fell: bool, judged: Judgement, numbered: bool
) -> Examples | None:
    """The attacked images that are kept, for pictures and as witnesses."""
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
    """The settings that decide the draws of each image."""
    # Rows of earlier versions, whose batches continued the random numbers of the batch before, are not used.
    seeds = ["a seed each"] if settings.get("attacked", 0) > (context.batch_size or 0) else []
    return [context.batch_size, context.max_forward_batch, *seeds]


# -- one attack, batch by batch ---------------------------------------------------------------------------------------


class Batches:
    """The batches of an attack, each of which can be made without the others.

    Random starts depend on an image's index, so the batches do not matter for a deterministic model. For a random model
    each batch has a seed of its own.

    Args:
        attack: the attack.
        target: target of the attack.
        index: indices of the images, int64.
        subject: holds the images.
        context: context of the attack.
        kept: keeps the batches, and holds those that an interrupted run or another process finished.
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
        """Numbers of the batches, among these, that are not made yet."""
        return [number for number in numbers if self.kept.read(self.parts[number]) is None]

    def make(self, number: int) -> AttackedBatch:
        """Attack the images of a batch, and keep the batch.

        Args:
            number: number of the batch.

        Raises:
            TypeError: the attack returned no tensor.
            ValueError: the attack returned images that are not allowed (`check_adversarial`).
        """
        part = self.parts[number]
        self.subject.reseed_batch(number)
        batch = _attack(self.attack, self.target, part, self.subject, self.context)
        if self.rule is not None:
            batch.fell = self.subject.room.within(functools.partial(self._fallen, part, batch.images))
        self.kept.keep(part, batch)
        return batch

    def _fallen(self, part: Tensor, images: Tensor) -> list[int]:
        """Mask of the attacked images that the model misclassifies, as 0 and 1."""
        subject = self.subject
        judge = Judge(self.target, max_forward_batch=subject.room.limit(self.context.max_forward_batch))
        return has_fallen(judge.shares(images.to(subject.device), subject.y[part].to(subject.device))).int().tolist()

    def sums(self, share: Callable[[list[int]], None] | None = None, at_once: int = 1) -> AttackedBatch:
        """All images, attacked at the places of the index, with sums over the batches up to the last that was made.

        Args:
            share: makes batches, given by number, in several processes; None: this process makes all.
            at_once: number of batches that are shared before the rule is asked; without a rule, all are. A batch made
                beyond the point where the rule stops is left out, so that rows equal those of one process.
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
    """The number of withstanding images that say nothing about others: all if the attack lacked gradients."""
    usable = not batch.health["gradients"] or GradientHealth(dict(batch.health)).reliable
    return batch.stood_still if usable else len(batch.fell)


def _attack(
    attack: Attack, target: Classifier, part: Tensor, subject: Subject, context: AttackContext
) -> AttackedBatch:
    begin = time.perf_counter()
    x, y, ids = (tensor.to(subject.device) for tensor in (subject.x[part], subject.y[part], part + subject.first))

    def search() -> AttackResult:
        begin = None if context.begin is None else context.begin[part].to(subject.device)
        told = dataclasses.replace(
            context, sample_ids=ids, begin=begin, counts_health=True,
            max_forward_batch=subject.room.limit(context.max_forward_batch),
        )  # fmt: skip
        # The attack gets a copy: changes in place must not hide how far it moved the images.
        return attack.search(target, x.clone(), y, told)

    graphs, device = context.graphs, subject.device
    result = subject.room.within(
        search if graphs is None else functools.partial(graphs.without_if_memory_ends, search, device)
    )
    if not isinstance(result, AttackResult):
        got = type(result).__name__
        raise TypeError(f"the attack {attack.name(context)!r} must return an AttackResult, got {got}")
    check_adversarial(attack.name(context), result.images, x, attack.threat_model(context))
    health = result.health or GradientHealth()
    return AttackedBatch(
        # Once the images are on the host, the device has finished its work.
        images=result.images.detach().cpu(),
        health={name: health.count(name) for name in COUNTS},
        seconds=time.perf_counter() - begin,
        warnings=result.warnings,
        fallen=result.fell_to,
        stood_still=int(result.stood_still),
        proved=int(result.proved),
    )
