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
from ..attacks import AttackContext, GradientHealth, frozen
from ..attacks.bpda import classifier_of
from ..defences.aggregation import WithAggregation
from ..protocols import Classifier, has_classifier
from .labels import ALONE, clean_name, row_name, threat_name
from .row_cache import RowCache
from .rows import Examples, Row
from .specs import CLASSIFIER, AttackSpec
from .subject import Judgement, Subject, Variant
from .watched import progress_bar, watched

#: Attacked images kept with each row, for the pictures.
EXAMPLES = 8


class Measure:
    """Makes the rows of one call of `evaluate`.

    Args:
        subject: what is attacked.
        context: what the attacks are told.
        name: of the model.
        cache: where finished rows are kept, if they are.
        progress: whether to show bars.
    """

    def __init__(self, subject: Subject, context: AttackContext, name: str, *, cache: RowCache | None, progress: bool):
        self.subject, self.context, self.name = subject, context, name
        self.cache, self.progress = cache, progress
        self._clean: dict[Variant, Row] = {}

    def clean(self, variant: Variant) -> Row:
        """The row of the clean images."""
        if variant not in self._clean:
            what = {"clean": variant, "n_eval": self.subject.judges(variant)}
            self._clean[variant] = self._kept(what, None, lambda: self._measure_clean(variant))
        return self._clean[variant]

    def attacked(self, spec: AttackSpec, left: np.ndarray) -> Row:
        """One attack's row.

        Args:
            spec: the attack.
            left: bool ``[n]``, which images earlier attacks on the variant left right.
        """
        alive = (left if spec.survivors_only else self.clean(spec.variant).robust)[: spec.max_images]
        settings = self._settings(spec) | {"attacked": int(alive.sum())}
        what = settings | {"alive": digest(torch.from_numpy(alive))}
        row = self._kept(what, spec, lambda: self._measure_attack(spec, alive, settings))
        # no part of the key: the same attack by any name
        row.attack, row.threat = row_name(spec, self.context), threat_name(spec, self.context)
        return row

    def _settings(self, spec: AttackSpec) -> dict[str, Any]:
        """What is run, in plain values."""
        target = spec.target
        on = "defence" if target is None else ALONE if target == CLASSIFIER else type(target).__name__
        return spec.resolved.settings(self.context) | {
            "variant": spec.variant,
            "target": on,
            "max_images": spec.max_images,
            "survivors_only": spec.survivors_only,
            "n_eval": self.subject.judges(spec.variant),
            # BPDA has an aggregation among its own options
            **({} if spec.aggregation is None else {"aggregation": spec.aggregation}),
        }

    def _kept(self, what: dict[str, Any], spec: AttackSpec | None, make: Callable[[], Row]) -> Row:
        """The row of these settings, of an attack or of the clean images, from the cache if it has it."""
        if self.cache is None:
            return make()
        subject, context = self.subject, self.context
        if spec is not None:
            revision = spec.resolved.revision()
            if revision is None:
                return make()
            what = what | {"attack": [spec.resolved.kind, revision, *spec.resolved.identity()]}
        other = None if spec is None else spec.other_model
        # which image gets which draws depends on them
        batches = [context.batch_size, context.max_forward_batch] if subject.is_random else []
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

    def _measure_attack(self, spec: AttackSpec, alive: np.ndarray, settings: dict[str, Any]) -> Row:
        begin = time.perf_counter()
        subject, attack, label = self.subject, spec.resolved, row_name(spec, self.context)
        index = torch.from_numpy(alive).nonzero()[:, 0]
        x = subject.x[: len(alive)]
        health, adversarial = GradientHealth(), x.clone()
        subject.reseed("attack")
        target = self._target(spec)
        with subject.variant(spec.variant), frozen(target):
            context = dataclasses.replace(
                self.context, draws_differ=self._draws_differ(spec, target), health=health, warnings=[], found={}
            )
            # of a target that predicts the same every time one draw is enough
            settings |= {name: value for name, value in attack.settings(context).items() if name == "eot_iter"}
            cost = attack.cost(context)
            total = None if cost is None else cost * len(index)
            with progress_bar(f"{self.name}: {label}", self.progress, total) as bar:
                self._run(spec, watched(target, bar), index, adversarial, context)
        if context.warnings or attack.batches_itself:
            settings["warnings"] = context.warnings
        judged = subject.judge(adversarial, spec.variant, "judge")
        # what was not attacked counts as lost
        right = judged.right & alive
        counts = {what: health.count(what) for what in ("gradients", "nonfinite", "zero", "images", "unmoved")}
        return Row(
            attack=label,
            kind=attack.kind,
            variant=spec.variant,
            robust=right.all(0),
            seconds=time.perf_counter() - begin,
            health=counts if counts["gradients"] else None,
            reliable=health.reliable,
            settings=settings,
            examples=_examples(x, adversarial, subject.y, index),
            **self._common(judged, right),
        )

    def _target(self, spec: AttackSpec) -> Classifier:
        """What the attack runs on."""
        model = self.subject.model
        if spec.aggregation is not None:
            return WithAggregation(model, spec.aggregation)  # type: ignore[arg-type]  # a model with sample_logits
        if spec.target == CLASSIFIER and has_classifier(model):
            return classifier_of(model)
        return spec.resolved.target(model) if spec.other_model is None else spec.other_model

    def _draws_differ(self, spec: AttackSpec, target: Classifier) -> bool:
        """Whether the target predicts something else every time. Within the variant's block."""
        subject = self.subject
        # an aggregation that is infinite everywhere hides the draws behind it
        hidden = subject.is_random and spec.variant == "random" and not target(subject.some()).isfinite().all()
        return hidden or subject.draws(target)

    def _run(
        self, spec: AttackSpec, model: Classifier, index: Tensor, adversarial: Tensor, context: AttackContext
    ) -> None:
        """Attack the images of ``index``, and put what is found into ``adversarial``.

        Batch by batch, unless the attack makes its own batches; random starts are tied to an image's index, so that the
        batches do not matter.
        """
        subject = self.subject
        size = max(1, len(index)) if spec.resolved.batches_itself else context.batch_size
        for part in index.split(size):
            if len(part) == 0:
                continue
            x, y, ids = (tensor.to(subject.device) for tensor in (subject.x[part], subject.y[part], part))
            found = spec.resolved.search(model, x, y, dataclasses.replace(context, sample_ids=ids))
            adversarial[part] = found.to(adversarial.device)


def _examples(x: Tensor, adversarial: Tensor, y: Tensor, index: Tensor) -> Examples | None:
    index = index[:EXAMPLES]
    if len(index) == 0:
        return None
    return Examples(x[index].cpu().numpy(), adversarial[index].cpu().numpy(), y[index.to(y.device)].cpu().numpy())
