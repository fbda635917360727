"""The plan of an evaluation: which of the attacks a model allows, each once, under names that differ."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence

import torch

from ..attacks import BPDA, PGD, AttackContext, AutoAttack
from ..protocols import DeterministicMode, FixedNoise, SampleLogits, has_classifier, is_purifier, supports
from .names import row_name
from .specs import CLASSIFIER, AttackSpec
from .subject import Subject, precision_name

logger = logging.getLogger("purify_fast")


def feasible(
    specs: Sequence[AttackSpec], subject: Subject, context: AttackContext, name: str
) -> tuple[list[AttackSpec], list[str]]:
    """The attacks this model allows, with notes on the others; for a deterministic model every variant is itself.

    A variant that is not what its name promises is attacked by nothing: no number of it would mean anything.

    Args:
        specs: the attacks, in their order.
        subject: the model with its images.
        context: what the evaluation tells attacks.
        name: of the model, for the notes.

    Raises:
        ValueError: two attacks that differ would share a name.
    """
    images = len(subject.y)
    notes: list[str] = []
    plan: list[AttackSpec] = []
    for spec in specs:
        obstacle, fault = _obstacle(spec, subject), None
        if obstacle is None and (fault := subject.fault(spec.variant)) is not None:
            obstacle = fault.reason
        if obstacle is not None:
            notes.append(f"{name}: {row_name(spec, context, images)} was left out: {obstacle}")
            if fault is not None:
                logger.warning(notes[-1])
            continue
        if not subject.is_random:
            spec = dataclasses.replace(spec, variant="random")
        if not any(_repeats(spec, before, subject, context) for before in plan):
            plan.append(spec)
    notes += pgd_in_float32(plan, precision_name(subject.model, subject.device), subject.device)
    # a number of images that there are not more of is in no name, unless it alone tells two attacks apart: a list of
    # attacks that many images allow is allowed by a few
    count = Counter(row_name(spec, context, images) for spec in plan)
    plan = [
        dataclasses.replace(spec, label=row_name(spec, context)) if count[row_name(spec, context, images)] > 1 else spec
        for spec in plan
    ]
    names = Counter(row_name(spec, context, images) for spec in plan)
    double = [label for label, times in names.items() if times > 1]
    if double:
        raise ValueError(f"attacks need labels of their own, these share one: {', '.join(double)}")
    return plan, notes


def pgd_in_float32(plan: Sequence[AttackSpec], precision: str | None, device: torch.device) -> list[str]:
    """The note about rows of PGD that take their gradients in float32 on a GPU, which the others need not."""
    if device.type != "cuda" or precision is not None or not any(isinstance(spec.resolved, PGD) for spec in plan):
        return []
    return [
        "the rows of PGD take their gradients in IEEE float32, which is about 5 times as slow as TF32 in batches of "
        "250 (an estimate, not measured); --precision tf32 of purify-fast evaluate takes TF32 everywhere"
    ]


def _repeats(spec: AttackSpec, before: AttackSpec, subject: Subject, context: AttackContext) -> bool:
    """Whether the same model would be attacked on the same images by the same attack again."""
    images = len(subject.y)
    same_name = row_name(spec, context, images) == row_name(before, context, images)
    if not same_name or _on_all(spec, images) != _on_all(before, images):
        return False
    # of a random model a repeated entry is a mistake, but not one that only these few images make a repetition
    return not subject.is_random or spec.max_images != before.max_images


def _on_all(spec: AttackSpec, images: int) -> AttackSpec:
    """The attack without a number of images that there are not more of."""
    every = spec.max_images is not None and spec.max_images >= images
    return dataclasses.replace(spec, max_images=None) if every else spec


def _obstacle(spec: AttackSpec, subject: Subject) -> str | None:
    """Why a model cannot be attacked so, if it cannot."""
    model, attack = subject.model, spec.resolved
    if isinstance(attack, BPDA) and not is_purifier(model):
        return "the model has no purify() and classifier"
    if spec.target == CLASSIFIER and not has_classifier(model):
        return "the model has no classifier"
    if spec.aggregation is not None and not supports(model, SampleLogits):
        return "the model has no sample_logits()"
    if not subject.is_random:
        rand = isinstance(attack, AutoAttack) and attack.version == "rand"
        return "the model is deterministic" if rand else None
    if spec.variant == "fixed" and not supports(model, FixedNoise):
        return "the model is randomised and has no fixed_noise()"
    if spec.variant == "deterministic" and not supports(model, DeterministicMode):
        return "the model is randomised and has no deterministic()"
    return None
