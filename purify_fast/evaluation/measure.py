"""The rows of an evaluation, made or read from the folder that keeps them: attack, judge, count."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._tensors import digest
from ..attacks import AttackersHead, AutoAttack, GradientHealth, Run, frozen
from ..attacks.bpda import classifier_of
from ..defences.aggregation import WithAggregation
from ..protocols import Classifier, has_classifier
from .batches import attack_in_batches
from .keep.cache import Batch, PartialRow, RowCache
from .plan import ALONE, clean_name, row_name, threat_name, tried_name
from .progress import CountedModel, Progress, counted_model
from .rows import AUTHORS, VARIANTS_APART, Examples, Row
from .specs import CLASSIFIER, AttackSpec
from .subject import Judgement, Subject, Variant

#: Attacked images kept with each row, for the pictures.
EXAMPLES = 8


@dataclasses.dataclass(frozen=True)
class _Search:
    """The outcome of an attack, before it is judged.

    Args:
        spec: the attack.
        images: all images, attacked or not, ``[n, C, H, W]``.
        index: which of them were attacked, int64.
        sums: health and time, over the batches.
        settings: what is known of the attack's settings only after it.
    """

    spec: AttackSpec
    images: Tensor
    index: Tensor
    sums: Batch
    settings: dict[str, Any]


class Measure:
    """Makes the rows of one call of `evaluate`.

    Args:
        subject: what is attacked.
        context: what the attacks are told.
        name: of the model.
        cache: the finished rows.
        progress: counts and shows.
    """

    def __init__(self, subject: Subject, context: Run, name: str, cache: RowCache, progress: Progress):
        self.subject, self.context, self.name, self.cache, self.progress = subject, context, name, cache, progress
        self._clean: dict[Variant, Row] = {}
        self._targets: dict[int, CountedModel] = {}
        # the last one, whose images may be tried on another variant
        self._search: _Search | None = None

    def clean(self, variant: Variant) -> Row:
        """The row of the clean images."""
        if variant not in self._clean:
            settings = {"clean": variant, "n_eval": self.subject.judges(variant)}
            self._clean[variant] = self._row(settings, None, lambda _: self._measure_clean(variant))
        return self._clean[variant]

    def attacked(self, spec: AttackSpec, left: np.ndarray) -> Row:
        """One attack's row.

        Args:
            spec: the attack.
            left: bool ``[n]``, which images earlier attacks on the variant left right.
        """
        alive = self._alive(spec, spec.variant, left)
        if spec.judge is not None:
            # what the defence gets wrong, its authors' model may get right
            alive = np.ones_like(alive)
        settings = self._settings(spec) | {"attacked": int(alive.sum())}
        images = {"alive": digest(torch.from_numpy(alive))}
        row = self._row(settings | images, spec, functools.partial(self._measure_attack, spec, alive, settings))
        # no part of the key: the same attack by any name
        row.attack = self.name_of(spec)
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
        attacked = self._settings(spec)
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
                search = self._attack(spec, alive, unfinished)
            begin = time.perf_counter()
            judged = self.subject.judge(search.images, "random", "judge")
            # an image falls only by what the attack made of it
            row = self._judged(search, settings, judged, (judged.right | ~alive) & standing)
            row.transferred = True
            row.seconds = time.perf_counter() - begin
            return row

        row = self._row(settings | images, spec, make)
        row.attack = tried_name(self.name_of(spec))
        return row

    def _alive(self, spec: AttackSpec, variant: Variant, left: np.ndarray) -> np.ndarray:
        """Which of its images an attack is given, of those that a variant classifies correctly."""
        return (left if spec.survivors_only else self.clean(variant).robust)[: spec.max_images]

    def name_of(self, spec: AttackSpec) -> str:
        """What an attack's row is called."""
        return row_name(spec, self.context, len(self.subject.y))

    def _settings(self, spec: AttackSpec) -> dict[str, Any]:
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
        row = self.cache.row(self._key(settings, spec), make)
        # these are no part of the key
        row.model = self.name
        row.settings["deterministic"] = not self.subject.is_random
        row.threat = None if spec is None else threat_name(spec, self.context)
        # an attack that left nothing lacked nothing
        row.reliable = row.reliable or not row.robust.any()
        return row

    def _key(self, settings: dict[str, Any], spec: AttackSpec | None) -> str | None:
        """All that a row depends on, as the name of its file; None where it cannot be kept."""
        subject, context = self.subject, self.context
        attack = other = None
        if spec is not None:
            revision, other = spec.resolved.revision(), spec.other_model
            if revision is None:
                return None
            attack = [spec.resolved.kind, revision, *spec.resolved.identity()]
        whole = {
            "data": subject.data,
            "seed": subject.seed,
            "classes": subject.num_classes,
            # which image gets which draws depends on them
            "batches": [context.batch_size, context.max_forward_batch] if subject.is_random else [],
            "attack": attack,
            "settings": settings,
        }
        return self.cache.key(whole, subject.model, other)

    def _measure_clean(self, variant: Variant) -> Row:
        begin = time.perf_counter()
        judged = self.subject.judge(self.subject.x, variant, "clean")
        return Row(
            attack=clean_name(variant),
            kind="clean",
            variant=variant,
            robust=judged.right[0],
            seconds=time.perf_counter() - begin,
            **self._common(judged, judged.right),
        )

    def _common(self, judged: Judgement, right: np.ndarray) -> dict[str, Any]:
        """What every row says of the model's predictions."""
        return {
            "model": self.name,
            "mean": float(right.mean()),
            "worst": float(right.all(0).mean()),
            "n_eval": len(right),
            "seed": self.subject.seed,
            "data": self.subject.data,
            "nonfinite_predictions": judged.nonfinite,
        }

    def _attack(self, spec: AttackSpec, alive: np.ndarray, unfinished: PartialRow) -> _Search:
        """Run an attack on the images that it is given."""
        subject, attack, label = self.subject, spec.resolved, self.name_of(spec)
        index = torch.from_numpy(alive).nonzero()[:, 0]
        subject.reseed("attack")
        target = self._target(spec)
        with subject.variant(spec.variant), frozen(target):
            context = dataclasses.replace(
                self.context,
                draws_differ=self._draws_differ(spec, target),
                gradients_from=spec.gradients_from,
                seed=subject.seed + spec.seed,
            )
            # of a target that predicts the same every time one draw is enough
            settings = {name: value for name, value in attack.settings(context).items() if name == "eot_iter"}
            cost = attack.cost(context)
            counted = self._targets.setdefault(id(target), counted_model(target, self.progress))
            with self.progress.row(label, None if cost is None else cost * len(index)):
                adversarial, sums = attack_in_batches(
                    attack, counted, index, subject=subject, context=context, unfinished=unfinished
                )
        if sums.warnings or isinstance(attack, AutoAttack):
            settings["warnings"] = sums.warnings
        if sums.fallen:
            settings["fallen to"] = sums.fallen
        return _Search(spec, adversarial[: len(alive)], index, sums, settings)

    def _measure_attack(
        self, spec: AttackSpec, alive: np.ndarray, settings: dict[str, Any], unfinished: PartialRow
    ) -> Row:
        search = self._attack(spec, alive, unfinished)
        self._search = None if spec.variant == "random" else search
        begin = time.perf_counter()
        judged = self.subject.judge(search.images, spec.variant, "judge", spec.judge)
        # what was not attacked counts as lost
        row = self._judged(search, settings, judged, judged.right & alive)
        health = search.sums.health
        row.health = health if health["gradients"] else None
        target = spec.other_model if spec.target is None else spec.target
        # another aggregation of the same samples is the same model
        row.transferred = target is not None and not isinstance(target, (WithAggregation, AttackersHead))
        row.seconds = search.sums.seconds + time.perf_counter() - begin
        return row

    def _judged(self, search: _Search, settings: dict[str, Any], judged: Judgement, right: np.ndarray) -> Row:
        """The row of an attack's images, from the predictions that count."""
        return Row(
            attack=self.name_of(search.spec),
            kind=search.spec.resolved.kind if search.spec.judge is None else AUTHORS,
            variant=settings["variant"],
            robust=np.asarray(right.all(0)),
            seconds=0.0,
            reliable=GradientHealth(dict(search.sums.health)).reliable,
            settings=settings | search.settings,
            examples=_examples(self.subject, search.images, search.index, judged),
            margins=judged.margins,
            **self._common(judged, right),
        )

    def _target(self, spec: AttackSpec) -> Classifier:
        """What the attack runs on."""
        model = self.subject.model
        if spec.aggregation is not None:
            return WithAggregation(model, spec.aggregation)  # type: ignore[arg-type]  # a model with sample_logits
        if spec.gradients_from is not None:
            return model
        if spec.target == CLASSIFIER and has_classifier(model):
            return classifier_of(model)
        return spec.resolved.target(model) if spec.other_model is None else spec.other_model

    def _draws_differ(self, spec: AttackSpec, target: Classifier) -> bool:
        """Whether the target predicts something else every time. Within the variant's block."""
        subject = self.subject
        # an aggregation that is infinite everywhere hides the draws behind it
        hidden = subject.is_random and spec.variant == "random" and not target(subject.some()).isfinite().all()
        return hidden or subject.draws(target)


def _examples(subject: Subject, adversarial: Tensor, index: Tensor, judged: Judgement) -> Examples | None:
    """Images for the pictures: some that fell to the attack; where none did, some that withstood it."""
    if len(index) == 0:
        return None
    fallen = index[torch.from_numpy(~judged.right.all(0))[index]]
    shown = (fallen if len(fallen) else index)[:EXAMPLES]
    return Examples(
        clean=subject.x[shown].cpu().numpy(),
        adversarial=adversarial[shown].cpu().numpy(),
        labels=subject.y[shown.to(subject.y.device)].cpu().numpy(),
        fell=np.full(len(shown), len(fallen) > 0),
        predicted=judged.classes[shown.numpy()],
    )
