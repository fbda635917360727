"""Makes the rows of an evaluation, or finds them again: attack, judge, count."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._fingerprint import digest
from ..attacks import AttackContext, AutoAttack, GradientHealth, frozen
from ..attacks.bpda import classifier_of
from ..defences.aggregation import WithAggregation
from ..protocols import Classifier, has_classifier
from .batchwise import attack_batchwise
from .labels import ALONE, clean_name, row_name, threat_name
from .partial_row import PartialRow
from .progress import Progress
from .row_cache import RowCache
from .rows import AUTHORS, Examples, Row
from .specs import CLASSIFIER, AttackSpec
from .subject import Judgement, Subject, Variant
from .watched import watched

#: Attacked images kept with each row, for the pictures.
EXAMPLES = 8


class Measure:
    """Makes the rows of one call of `evaluate`.

    Args:
        subject: what is attacked.
        context: what the attacks are told.
        name: of the model.
        cache: where finished rows are kept, if they are.
        progress: is told what goes on.
    """

    def __init__(
        self, subject: Subject, context: AttackContext, name: str, *, cache: RowCache | None, progress: Progress
    ):
        self.subject, self.context, self.name = subject, context, name
        self.cache, self.progress = cache, progress
        self._clean: dict[Variant, Row] = {}

    def clean(self, variant: Variant) -> Row:
        """The row of the clean images."""
        if variant not in self._clean:
            what = {"clean": variant, "n_eval": self.subject.judges(variant)}
            row = self._kept(what, None, lambda _: self._measure_clean(variant))
            self._clean[variant] = self._said(row)
        return self._clean[variant]

    def attacked(self, spec: AttackSpec, left: np.ndarray) -> Row:
        """One attack's row.

        Args:
            spec: the attack.
            left: bool ``[n]``, which images earlier attacks on the variant left right.
        """
        alive = (left if spec.survivors_only else self.clean(spec.variant).robust)[: spec.max_images]
        if spec.judge is not None:
            # what the defence gets wrong, its authors' model may get right
            alive = np.ones_like(alive)
        settings = self._settings(spec) | {"attacked": int(alive.sum())}
        what = settings | {"alive": digest(torch.from_numpy(alive))}
        at = self.progress.at
        row = self._kept(what, spec, lambda kept: self._measure_attack(spec, alive, settings, kept))
        self.progress.kept(at)
        # no part of the key: the same attack by any name
        row.attack, row.threat = self.name_of(spec), threat_name(spec, self.context)
        return self._said(row)

    def name_of(self, spec: AttackSpec) -> str:
        """What an attack's row is called."""
        return row_name(spec, self.context, len(self.subject.y))

    def _said(self, row: Row) -> Row:
        """The row, which says whether the model is random; no part of the key, and not in rows kept earlier."""
        row.settings["deterministic"] = not self.subject.is_random
        return row

    def _settings(self, spec: AttackSpec) -> dict[str, Any]:
        """What is run, in plain values."""
        target = spec.other_model if spec.target is None else spec.target
        on = "defence" if target is None else ALONE if target == CLASSIFIER else type(target).__name__
        return spec.resolved.settings(self.context) | {
            "variant": spec.variant,
            "target": on,
            "max_images": spec.max_images,
            "survivors_only": spec.survivors_only,
            "n_eval": self.subject.judges(spec.variant) if spec.judge is None else 1,
            # BPDA has an aggregation among its own options
            **({} if spec.aggregation is None else {"aggregation": spec.aggregation}),
            **({} if spec.seed == 0 else {"seed": spec.seed}),
            **({} if spec.gradients_from is None else {"gradients_from": on}),
            **({} if spec.judge is None else {"judge": type(spec.judge).__name__}),
        }

    def _kept(self, what: dict[str, Any], spec: AttackSpec | None, make: Callable[[PartialRow], Row]) -> Row:
        """The row of these settings, of an attack or of the clean images, from the cache if it has it."""
        nothing = PartialRow(None)
        if self.cache is None:
            return make(nothing)
        subject, context = self.subject, self.context
        if spec is not None:
            revision = spec.resolved.revision()
            if revision is None:
                return make(nothing)
            what = what | {"attack": [spec.resolved.kind, revision, *spec.resolved.identity()]}
        other = None if spec is None else spec.other_model
        # which image gets which draws depends on them
        batches: list[Any] = [context.batch_size, context.max_forward_batch] if subject.is_random else []
        # such rows were made with one draw for all before
        batches += ["draws apart"] if subject.draws_once_per_call else []
        key = self.cache.key(
            {
                "data": subject.data,
                "seed": subject.seed,
                "classes": subject.num_classes,
                "batches": batches,
                "what": what,
            },
            subject.model,
            other,
        )
        row = self.cache.row(key, make)
        # the name is no part of the key
        row.model = self.name
        return row

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

    def _measure_attack(self, spec: AttackSpec, alive: np.ndarray, settings: dict[str, Any], kept: PartialRow) -> Row:
        subject, attack, label = self.subject, spec.resolved, self.name_of(spec)
        index = torch.from_numpy(alive).nonzero()[:, 0]
        subject.reseed("attack")
        target = self._target(spec)
        with subject.variant(spec.variant), frozen(target):
            differ = self._draws_differ(spec, target)
            context = dataclasses.replace(
                self.context, draws_differ=differ, gradients_from=spec.gradients_from, seed=subject.seed + spec.seed
            )
            # of a target that predicts the same every time one draw is enough
            settings |= {name: value for name, value in attack.settings(context).items() if name == "eot_iter"}
            cost = attack.cost(context)
            with self.progress.row(label, None if cost is None else cost * len(index)) as bar:
                adversarial, done = attack_batchwise(
                    attack, watched(target, bar), index, subject=subject, context=context, kept=kept
                )
        told = {"warnings": done.warnings, "fallen to": done.fallen}
        settings |= {name: value for name, value in told.items() if value}
        if isinstance(attack, AutoAttack):
            settings.setdefault("warnings", [])
        found, health = adversarial[: len(alive)], done.health
        begin = time.perf_counter()
        judged = subject.judge(found, spec.variant, "judge", spec.judge)
        # what was not attacked counts as lost
        right = judged.right & alive
        return Row(
            attack=label,
            kind=attack.kind if spec.judge is None else AUTHORS,
            variant=spec.variant,
            robust=right.all(0),
            seconds=done.seconds + time.perf_counter() - begin,
            health=health if health["gradients"] else None,
            reliable=GradientHealth(dict(health)).reliable,
            settings=settings,
            examples=_examples(subject, found, index, judged),
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
    """Images for the pictures: some that fell to the attack; where none did, some that withstood it.

    Args:
        subject: the model with its images.
        adversarial: what became of them, ``[n, C, H, W]``.
        index: which of them were attacked, int64.
        judged: the predictions after the attack.
    """
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
