"""Makes the rows of an evaluation: for each row, an attack runs, and new predictions judge the attacked images."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._sealed import write_sealed
from ..._tensors import digest
from ...attacks import AttackContext, AttackersHead, frozen
from ...defences.stochastic import WithAggregation
from ..asked.naming import clean_name, row_name, threat_name
from ..asked.specs import AttackSpec
from ..asked.subject import Subject, Variant
from ..results.rows import VARIANTS_APART, Row, by_worst_points
from .attack_run import AttackedBatch, AttackRun
from .cache import RowCache, read_file, remove_batches
from .progress import CountedModel, Progress, counted_model
from .row_judge import RowJudge
from .specified import settings_of, target_of
from .stopping import StoppingRule, by_margin, nearest_first
from .team import Task, Team

#: The file with the first points of an attack, for the processes that share the attack.
BEGIN = "begin.safetensors"
#: The rule by which random models are judged (docs/judge_reference.md). Increase it if the rule changes rows.
RULE = 2


@dataclass
class Measure:
    """Makes the rows of one call of `evaluate`.

    Args:
        subject: the attacked model with its images.
        context: the settings of the attacks.
        name: name of the model.
        cache: the cache of finished rows.
        progress: counts images and shows the progress.
        team: the processes of the evaluation.
        keep_all: whether rows contain every fallen image, and not only some for the pictures.

    Attributes:
        attacks: all attacks of the evaluation, in the same order in every process.
        judge: judges the images of attacks, and makes the rows.
    """

    subject: Subject
    context: AttackContext
    name: str
    cache: RowCache
    progress: Progress
    team: Team
    keep_all: bool = False
    attacks: list[AttackSpec] = field(default_factory=list, init=False)
    judge: RowJudge = field(init=False)
    _clean: dict[Variant, Row] = field(default_factory=dict, init=False)
    _targets: dict[int, CountedModel] = field(default_factory=dict, init=False)
    # The number of finished runs of each attack.
    _runs: Counter[int] = field(default_factory=Counter, init=False)
    # The last attack on a variant other than "random", and its outcome: the deployed model judges its images too.
    _search: tuple[AttackRun, AttackedBatch] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.judge = RowJudge(self.subject, self.context, self.name, self.keep_all)

    def clean(self, variant: Variant) -> Row:
        """The row of the clean images."""

        def make() -> Row:
            begin = time.perf_counter()
            judged = self.subject.judge(self.subject.x, variant, "judge")
            chosen: dict[str, Any] = {}
            if self.judge.chooses(variant):
                by_choice = self.subject.judge(self.subject.x, variant, "choose")
                chosen = {"wrong": by_choice.wrong, "margins": by_choice.margins}
            return self.judge.new_row(
                judged.right,
                attack=clean_name(variant),
                kind="clean",
                variant=variant,
                nonfinite_predictions=judged.nonfinite,
                seconds=time.perf_counter() - begin,
                **chosen,
            )

        if variant not in self._clean:
            settings = {"clean": variant, "n_eval": self.subject.judges(variant)}
            self._clean[variant] = self.load_or_make(settings, [], make)
        return self._clean[variant]

    def attacked(self, spec: AttackSpec, left: np.ndarray, margins: np.ndarray, earlier: Sequence[Row] = ()) -> Row:
        """The row of an attack.

        Args:
            spec: the attack.
            left: bool ``[n]``, True for images that withstood the earlier attacks on the variant.
            margins: the smallest margin that an earlier attack reached on each image, ``[n]``; infinite without such an
                attack.
            earlier: for a random model: the rows whose points the row of an attack on survivors may count.
        """
        alive = self._alive(spec, spec.variant, left)
        if spec.judge is not None:
            # All images: the judge (the authors' model) may classify images correctly that the defence misclassifies.
            alive = np.ones_like(alive)
        index = self.in_order(spec, torch.from_numpy(alive.copy()).nonzero()[:, 0], margins)
        settings = settings_of(spec, self.subject, self.context)
        images = {"alive": digest(torch.from_numpy(alive)), "order": digest(index)} | self._known(spec, earlier)

        def make() -> Row:
            run, sums = self.attack(spec, index, self.folder(spec), ahead=self._ahead(spec, left, margins))
            self._search = None if spec.variant == "random" else (run, sums)
            # On a deterministic model, images outside `alive` are misclassified or have fallen, and count as fallen.
            row = self.judge.judged(run, sums, settings, alive, [self.clean("random"), *earlier])
            row.health = sums.health if sums.health["gradients"] else None
            target = spec.other_model if spec.target is None else spec.target
            # A model that differs only in the aggregation of its samples is not taken as another model.
            row.transferred = target is not None and not isinstance(target, (WithAggregation, AttackersHead))
            row.seconds += sums.seconds
            return row

        row = self.load_or_make(settings | images, [spec], make)
        # The key of a cached row does not contain the row's name, so the row may have been made under another name.
        row.attack = row_name(spec, self.context)
        self.progress.next_row()
        return row

    def retest_on_deployed(self, spec: AttackSpec, left: np.ndarray, earlier: Sequence[Row]) -> Row:
        """The row in which the deployed model judges, with fresh draws, the images of an attack on another variant.

        Args:
            spec: the attack.
            left: bool ``[n]``, True for images that withstood the earlier attacks on the variant.
            earlier: see `attacked`.
        """
        alive = self._alive(spec, spec.variant, left)
        attacked = settings_of(spec, self.subject, self.context)
        settings = attacked | {
            "variant": "random",
            "n_eval": self.subject.judges("random"),
            "target": f"{attacked['target']}, {VARIANTS_APART[spec.variant]}",
        }
        images = {"alive": digest(torch.from_numpy(alive))} | self._known(spec, earlier)

        def make() -> Row:
            # If the attack's row was read from the cache, its images are not in memory, and the attack must run again.
            search, self._search = self._search, None
            if search is None or search[0].spec is not spec:
                search = self.attack(spec, torch.from_numpy(alive).nonzero()[:, 0], self.folder(spec))
            row = self.judge.judged(*search, settings, alive, [self.clean("random"), *earlier])
            row.transferred = True
            return row

        row = self.load_or_make(settings | images, [spec], make)
        row.attack = f"{row_name(spec, self.context)}, tried on the deployed defence"
        return row

    def in_order(self, spec: AttackSpec, index: Tensor, margins: np.ndarray) -> Tensor:
        """Return the indices of the images that an attack gets, int64, in the order in which they are attacked.

        Args:
            spec: the attack.
            index: indices of the images that the attack may get, int64.
            margins: the smallest margin that other attacks reached on each image of the subject, ``[n]``.
        """
        if spec.nearest is not None:
            return by_margin(index, margins)[: spec.nearest]
        if spec.until is not None:
            return nearest_first(index, margins, self.subject.seed + spec.seed)
        return index

    def _alive(self, spec: AttackSpec, variant: Variant, left: np.ndarray) -> np.ndarray:
        """Return the images for an attack, bool ``[n]``: ``left``, or all that have not fallen without an attack."""
        return (left if spec.survivors_only else self.judge.withstood(self.clean(variant)))[: spec.max_images]

    def _known(self, spec: AttackSpec, earlier: Sequence[Row]) -> dict[str, str]:
        """A hash of the earlier points on which the row of a random model depends; empty if there are none."""
        if not earlier or not (spec.survivors_only or self.keep_all):
            return {}
        known = by_worst_points(earlier, min(row.n for row in earlier))
        return {"known": digest(*map(torch.from_numpy, known))}

    def load_or_make(self, settings: dict[str, Any], specs: Sequence[AttackSpec], make: Callable[[], Row]) -> Row:
        """Read the row with these settings from the cache, or make the row and cache it.

        Args:
            settings: the settings as plain values.
            specs: the attacks; empty for the clean images.
            make: a function that makes the row.
        """
        folder = self.folder(specs[0]) if len(specs) == 1 else None
        row = self.cache.row(self._key(settings, specs), make, folder)
        # The following fields are not a part of the key, so they are also set for a cached row.
        row.model = self.name
        row.threat = threat_name(specs[0], self.context) if specs else None
        row.deterministic = not self.subject.is_random
        # Missing gradients are no reason for doubt if every image fell.
        row.reliable = row.reliable or bool((row.share_wrong == 1).all())
        return row

    def folder(self, spec: AttackSpec) -> Path | None:
        """The folder of an attack's batches in the cache; None if the batches are not cached."""
        return self.cache.batches(self._key(settings_of(spec, self.subject, self.context), [spec]))

    def _key(self, settings: dict[str, Any], specs: Sequence[AttackSpec]) -> str | None:
        """The name in the cache of a row with these settings and attacks; None if the row is not cached."""
        subject, context = self.subject, self.context
        attacks = [[spec.resolved.kind, spec.resolved.revision(), *spec.resolved.identity()] for spec in specs]
        whole = {
            "data": subject.data,
            # This constant is in the hashes that name cached rows, so it must stay.
            "first": 0,
            "seed": subject.seed,
            "classes": subject.num_classes,
            # The draws of a random model for an image depend on how the images are divided into batches.
            "batches": [context.resources.batch_size, context.resources.max_forward_batch] if subject.is_random else [],
            "judges": [context.judge_draws, context.judge_share],
            "attacks": attacks,
            "settings": settings,
            "keep": self.keep_all and bool(specs),
        }
        if subject.is_random:
            # Rows that were made by another rule for random models are not used.
            whole |= {"rule": RULE, "choosing": subject.choosing} | self.team.divided()
        # The row of an attack without a revision is not cached, because nothing would show a change of the attack.
        named = all(revision is not None for _, revision, *_ in attacks)
        models = [subject.model, *([spec.other_model for spec in specs] or [None])]
        return self.cache.key(whole, *models) if named else None

    def attack(
        self,
        spec: AttackSpec,
        index: Tensor,
        folder: Path | None,
        begin: Tensor | None = None,
        ahead: Sequence[Task] = (),
    ) -> tuple[AttackRun, AttackedBatch]:
        """Run an attack on some of the images.

        Args:
            spec: the attack.
            index: indices of these images, int64, in the order in which they are attacked.
            folder: the folder for the batches in the cache, in which there may be batches of an interrupted run. With
                None, the batches are not cached.
            begin: first points of the search, ``[N, C, H, W]``; None: the attack's usual first points.
            ahead: batches of later attacks, for processes that have no batch of this attack.

        Returns:
            The run of the attack, and its outcome (see `AttackRun.sums`). The outcome has only the images that the
            attack may get by its ``max_images``.
        """
        team, number = self.team, self.attacks.index(spec)
        shared = self._shared(number, folder)
        with self._run(spec, index, shared, begin) as run:
            obtain = None
            if team.world > 1:
                if begin is not None:
                    assert shared is not None
                    write_sealed(shared / BEGIN, {}, {"points": begin})
                task = self._task(number, run, begin is not None)
                team.publish([task, *ahead])
                obtain = functools.partial(self._obtain, run, task)
            cost = spec.resolved.cost(run.context)
            with self.progress.row(row_name(spec, self.context), None if cost is None else cost * len(index)):
                sums = run.sums(obtain)
        self._runs[number] += 1
        if shared is not None and team.withdraw(str(shared.resolve())):
            self.cache.busy.add(shared)
        elif shared != folder:
            remove_batches(shared)
        sums.images = sums.images[: spec.max_images]
        return run, sums

    def _shared(self, number: int, folder: Path | None) -> Path | None:
        """The folder of an attack's batches, for all processes; ``folder`` is the one in the cache."""
        return self.team.folder(folder, self.cache.folder, f"{number} {self._runs[number]}")

    def _task(self, number: int, run: AttackRun, begins: bool = False) -> Task:
        """The missing batches of an attack, for all processes."""
        assert run.folder is not None
        return Task(
            attack=number,
            run=self._runs[number],
            images=run.index.numpy().tobytes(),
            batches=[(each, name) for each, name in enumerate(run.names) if run.read(each) is None],
            folder=str(run.folder.resolve()),
            draws_differ=run.context.draws_differ,
            begins=begins,
        )

    def _ahead(self, spec: AttackSpec, left: np.ndarray, margins: np.ndarray) -> list[Task]:
        """Predict the batches of the attacks after ``spec``, as far as these attack single images.

        It is assumed that ``spec`` changes neither the images that are left nor their order. A batch for which this is
        wrong is made for nothing, by a process that would have waited. So it changes no result.

        Args:
            spec: the present attack.
            left: see `attacked`.
            margins: see `attacked`.
        """
        tasks = list[Task]()
        for number in range(self.attacks.index(spec) + 1, len(self.attacks) if self.team.world > 1 else 0):
            each = self.attacks[number]
            alike = threat_name(each, self.context) == threat_name(spec, self.context) and each.survivors_only
            # The contexts of other variants cannot be entered within each other.
            if (
                each.nearest is None
                or not alike
                or {spec.variant, each.variant} != {"random"}
                or each.judge is not None
            ):
                break
            alive = torch.from_numpy(self._alive(each, each.variant, left)).nonzero()[:, 0]
            folder = self._shared(number, self.folder(each))
            with self._run(each, self.in_order(each, alive, margins), folder, None) as run:
                if run.by_image:
                    tasks.append(self._task(number, run))
        return tasks

    def _obtain(self, run: AttackRun, task: Task, number: int) -> AttackedBatch:
        """Read or make a batch of the present attack, which is in the newest list of the team."""

        def make(each: Task, number: int) -> None:
            if each is task:
                run.make(number)
            else:
                with self._run_of(each) as other:
                    other.make(number)

        read = functools.partial(run.read, number)
        batch = read()
        if batch is None and number in dict(task.batches):
            batch = self.team.obtain(task.place(run.names[number]), read, make, self.progress)
        return batch or run.make(number)

    def work_for_first(self) -> None:
        """Make batches for the first process until the evaluation ends."""
        with contextlib.ExitStack() as stack:
            opened, run = None, None
            for task, number in self.team.batches(self.progress):
                if run is None or task != opened:
                    stack.close()
                    opened, run = task, stack.enter_context(self._run_of(task))
                run.make(number)

    @contextlib.contextmanager
    def _run_of(self, task: Task) -> Iterator[AttackRun]:
        """A context with the run of an attack that another process, or this process, has published.

        Raises:
            ValueError: this process cannot see the folder of the batches.
        """
        folder = Path(task.folder)
        self.team.check_folder(folder)
        index = torch.frombuffer(bytearray(task.images), dtype=torch.int64)
        content = read_file(folder / BEGIN) if task.begins else None
        if task.begins and content is None:
            raise ValueError(
                f"{folder / BEGIN} is missing or damaged, although process 0 has written the first points of the "
                "attack to this file: start all processes again"
            )
        begin = None if content is None else content[1]["points"]
        with self._run(self.attacks[task.attack], index, folder, begin, task.draws_differ) as run:
            yield run

    @contextlib.contextmanager
    def _run(
        self,
        spec: AttackSpec,
        index: Tensor,
        folder: Path | None,
        begin: Tensor | None,
        draws_differ: bool | None = None,
    ) -> Iterator[AttackRun]:
        """A context with the run of an attack, in which the model is in the attack's variant.

        Args:
            spec: the attack.
            index: indices of the attacked images, int64, in the order in which they are attacked.
            folder: the folder for the batches; None: they are not saved.
            begin: first points of the search; None: the attack's usual first points.
            draws_differ: whether two predictions of the target differ; None lets a test decide.
        """
        subject = self.subject
        subject.reseed("attack")
        target = target_of(spec, self.subject)
        with subject.variant(spec.variant), frozen(target):
            # Some aggregations give infinite logits, which hide differences, and some models draw only for attacked
            # images: the draws are then taken as different.
            may_hide = subject.is_random and spec.variant == "random"
            hidden = may_hide and (subject.draws or not target(subject.sample_images()).isfinite().all())
            # Every process makes this test, whose draws must leave all random generators in the same state.
            tried = hidden or subject.answers_vary(target, elsewhere=subject.is_random)
            context = replace(
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
            yield AttackRun(spec, counted, index, subject, context, folder=folder, rule=rule, shares=self.team.shares)
