"""The meaning of an attack's specification for a subject: the model that is attacked, and the settings of the row."""

from __future__ import annotations

from typing import Any

from ...attacks import AttackContext
from ...attacks.bpda import classifier_of
from ...defences.stochastic import WithAggregation
from ...protocols import Classifier, has_classifier
from ..asked.naming import ALONE
from ..asked.specs import CLASSIFIER, AttackSpec
from ..asked.subject import Subject
from .stopping import REVISION as STOPPING


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
    view = spec.resolved.target(model)
    return subject.judged_model(spec.variant) if spec.judge is None and view is model else view


def settings_of(spec: AttackSpec, subject: Subject, context: AttackContext) -> dict[str, Any]:
    """The settings of an attack, in plain values, on which its row depends."""
    target = spec.other_model if spec.target is None else spec.target
    on = "defence" if target is None else ALONE if target == CLASSIFIER else type(target).__name__
    optional = {
        # This is the aggregation of the spec. BPDA's own option of this name is among the settings of the attack.
        "aggregation": spec.aggregation,
        "seed": spec.seed or None,
        "gradients_from": None if spec.gradients_from is None else on,
        "judge": None if spec.judge is None else type(spec.judge).__name__,
        "published": spec.published,
        "until": None if spec.until is None else [spec.until, STOPPING],
        "nearest": spec.nearest,
    }
    return spec.resolved.settings(context) | {
        "variant": spec.variant,
        "target": on,
        "max_images": spec.max_images,
        "survivors_only": spec.survivors_only,
        "n_eval": subject.judges(spec.variant) if spec.judge is None else 1,
        **{name: value for name, value in optional.items() if value is not None},
    }
