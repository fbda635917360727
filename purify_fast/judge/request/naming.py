"""Selects the attacks that a model allows, and names the rows of the report: one row for each attack."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from ...attacks import Attack, AttackContext
from ...attacks.losses import usable_loss
from ...protocols import Classifier
from ..searches.original_autoattack import OriginalAutoAttack
from .specs import AttackSpec
from .subject import Subject

logger = logging.getLogger("purify_fast")

_NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1", "flow": "flow"}


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
        rand = isinstance(spec.attack, OriginalAutoAttack) and spec.attack.version == "rand"
        if rand and not subject.is_random:
            notes.append(f"{name}: {row_name(spec, context)} was left out: the model is deterministic")
            continue
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


# -- names ------------------------------------------------------------------------------------------------------------


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
    threat, name = threat_name(spec, context), spec.label
    if name is None:
        name = spec.attack.name(context) + ("" if spec.through is None else f" through {_model_name(spec.through)}")
        name += "" if spec.nearest is None else f", {spec.nearest} nearest"
        name += "" if spec.max_images is None else f", first {spec.max_images}"
    return name + (f", {threat}" if threat is not None and threat not in name else "")


def _model_name(model: Classifier) -> str:
    """The name of another model in the name of a row: its class, or the name of a function."""
    return str(getattr(model, "__name__", type(model).__name__))


def short(eps: float) -> str:
    """Write a radius as a short decimal or as a multiple of 1/255, such as 0.5 or 8/255."""
    if float(f"{eps:.2g}") == eps:
        return f"{eps:.2g}"
    levels = 255 * eps
    return f"{levels:.0f}/255" if math.isclose(levels, round(levels), rel_tol=1e-5) else f"{eps:.3g}"
