"""Selects the attacks that a model allows, and names the rows of the report: one row for each attack."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from ...attacks import Attack, AttackContext
from ...attacks.losses import usable_loss
from ...protocols import DeterministicMode, FixedNoise, SampleLogits, has_classifier, supports
from ..searches.original_autoattack import OriginalAutoAttack
from .specs import CLASSIFIER, AttackSpec
from .subject import Subject, Variant

logger = logging.getLogger("purify_fast")

NOT_ADAPTIVE = "on the classifier alone (not adaptive)"
_NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1", "flow": "flow"}
_VARIANTS: dict[Variant, str] = {"random": "", "fixed": ", fixed noise", "deterministic": ", deterministic"}


def feasible(
    specs: Sequence[AttackSpec], subject: Subject, context: AttackContext, name: str
) -> tuple[list[AttackSpec], list[str]]:
    """Select the attacks that this model allows, without duplicates, and make notes on the others."""
    notes: list[str] = []
    plan: list[AttackSpec] = []
    for spec in specs:
        if spec.max_images is not None and spec.max_images >= len(subject.y):
            # The limit excludes no image, so it is removed. The name of the row then does not mention it.
            spec = dataclasses.replace(spec, max_images=None)
        if (obstacle := _obstacle(spec, subject)) is not None:
            notes.append(f"{name}: {row_name(spec, context)} was left out: {obstacle}")
            continue
        if not subject.is_random:
            spec = dataclasses.replace(spec, variant="random")
        # An attack that is already in the plan would find nothing new.
        if spec not in plan and not any(_repeats(spec, other, context) for other in plan):
            plan.append(spec)
    if specs and not plan:
        notes.append(f"{name}: no attack ran, so this report does not say how robust the model is")
        logger.warning(notes[-1])
    names = [row_name(spec, context) for spec in plan]
    double = [label for label in dict.fromkeys(names) if names.count(label) > 1]
    if double:
        raise ValueError(f"attacks must have different labels, got twice {', '.join(double)}: AttackSpec(label=...)")
    return plan, notes


def _repeats(spec: AttackSpec, earlier: AttackSpec, context: AttackContext) -> bool:
    """Return True if an attack repeats an earlier attack on the same or more images, after "margin" replaced losses."""
    losses: list[Any] = [getattr(each.attack, "loss", "margin") for each in (spec, earlier)]
    if all(usable_loss(loss, context.num_classes) == loss for loss in losses):
        return False
    if earlier.until is not None or earlier.nearest is not None or (earlier.survivors_only and not spec.survivors_only):
        return False
    whole: dict[str, Any] = {"until": None, "nearest": None, "survivors_only": earlier.survivors_only}
    one, other = (dataclasses.replace(each, attack=_as_it_runs(each.attack, context)) for each in (spec, earlier))
    return dataclasses.replace(one, **whole) == other


def _as_it_runs(attack: Attack, context: AttackContext) -> Attack:
    """The attack with the options with which it runs on this model."""
    own = {each.name for each in dataclasses.fields(attack)}
    options = {option: value for option, value in attack.resolved_for(context)._asdict().items() if option in own}
    if "give_up" in own:
        options["give_up"] = attack.may_end_early(context)
    return dataclasses.replace(attack, **options)


def beside_fixed(specs: Sequence[AttackSpec], subject: Subject) -> list[AttackSpec]:
    """Add, after each attack on the deployed model, the same attack under fixed noise, if the model has it."""
    if not supports(subject.base_model, FixedNoise):
        return list(specs)
    both: list[AttackSpec] = []
    for spec in specs:
        both.append(spec)
        as_it_is = spec.variant == "random" and spec.target is None and spec.aggregation is None
        rand = isinstance(spec.attack, OriginalAutoAttack) and spec.attack.version == "rand"
        if as_it_is and spec.other_model is None and not rand:
            label = None if spec.label is None else f"{spec.label}{_VARIANTS['fixed']}"
            both.append(dataclasses.replace(spec, variant="fixed", label=label))
    return both


def _obstacle(spec: AttackSpec, subject: Subject) -> str | None:
    """The reason why the attack cannot be run on this model; None if it can be run."""
    model, attack = subject.base_model, spec.attack
    rand = isinstance(attack, OriginalAutoAttack) and attack.version == "rand"
    mode = spec.variant if subject.is_random else "random"
    random = "the model is randomised and has no"
    obstacles = [
        (spec.target == CLASSIFIER and not has_classifier(model), "the model has no classifier"),
        (spec.aggregation and not supports(model, SampleLogits), "the model has no sample_logits()"),
        (rand and not subject.is_random, "the model is deterministic"),
        (mode == "fixed" and not supports(model, FixedNoise), f"{random} fixed_noise()"),
        (mode == "deterministic" and not supports(model, DeterministicMode), f"{random} deterministic()"),
    ]
    lacking = next((reason for stands, reason in obstacles if stands), None)
    fault = subject.fault(spec.variant) if lacking is None else None
    return lacking if fault is None else fault.reason


# -- names ------------------------------------------------------------------------------------------------------------


def clean_name(variant: Variant) -> str:
    """The name of the row of the clean images."""
    return f"clean{_VARIANTS[variant]}"


def ball_name(norm: str, eps: float) -> str:
    """A threat model in words, such as ``L-inf 8/255``."""
    return f"{_NORMS[norm]} {short(eps)}"


def threat_name(spec: AttackSpec, context: AttackContext) -> str | None:
    """The attack's threat model in words; None if it is the threat model of the report."""
    norm, eps = spec.attack.threat_model(context)
    if norm == context.norm and math.isclose(eps, context.eps, rel_tol=1e-6):
        return None
    return ball_name(norm, eps)


def row_name(spec: AttackSpec, context: AttackContext) -> str:
    """The name of the attack's row in the report."""
    name = _own_name(spec, context) if spec.label is None else spec.label
    # The user's label may contain these words already.
    alone = f" {NOT_ADAPTIVE}" if spec.target == CLASSIFIER and NOT_ADAPTIVE not in name else ""
    threat = threat_name(spec, context)
    return name + alone + (f", {threat}" if threat is not None and threat not in name else "")


def _own_name(spec: AttackSpec, context: AttackContext) -> str:
    # Without noise, or with fixed noise, a model always predicts the same, so the name has no number of draws.
    own = context if spec.variant == "random" else dataclasses.replace(context, draws_differ=False)
    name = spec.attack.name(own)
    if spec.aggregation is not None:
        name += f" through {spec.aggregation}"
    if spec.target is not None:
        name += f" {NOT_ADAPTIVE}" if spec.target == CLASSIFIER else " on another model"
    # AutoAttack's standard version is only for models without randomness, so its name does not mention fixed noise.
    standard = isinstance(spec.attack, OriginalAutoAttack) and spec.attack.version == "standard"
    if not (standard and spec.variant == "fixed"):
        name += _VARIANTS[spec.variant]
    name += "" if spec.nearest is None else f", {spec.nearest} nearest"
    return name + ("" if spec.max_images is None else f", first {spec.max_images}")


def short(eps: float) -> str:
    """Write a radius as a short decimal or as a multiple of 1/255, such as 0.5 or 8/255."""
    if float(f"{eps:.2g}") == eps:
        return f"{eps:.2g}"
    levels = 255 * eps
    return f"{levels:.0f}/255" if math.isclose(levels, round(levels), rel_tol=1e-5) else f"{eps:.3g}"
