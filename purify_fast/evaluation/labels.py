"""The names of rows: what was run, on what, in which threat model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..attacks import PGD, AttackContext, AutoAttack
from ..defences.base import Defence
from ..protocols import Classifier
from ..speed.precision import float32_settings
from .specs import CLASSIFIER, AttackSpec
from .subject import Variant

ALONE = "on the classifier alone (not adaptive)"
_NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1", "flow": "flow"}
_VARIANTS: dict[Variant, str] = {"random": "", "fixed": ", fixed noise", "deterministic": ", deterministic"}


def clean_name(variant: Variant) -> str:
    """The name of the row of the clean images."""
    return f"clean{_VARIANTS[variant]}"


def tried_name(attack: str) -> str:
    """The name of the row of what an attack on a variant found, tried on the model as it is deployed.

    Args:
        attack: the name of the attack's own row.
    """
    return f"{attack}, tried on the deployed defence"


def ball_name(norm: str, eps: float) -> str:
    """A threat model in words, such as ``L-inf 8/255``."""
    return f"{_NORMS[norm]} {short(eps)}"


def precision_name(model: Classifier, device: torch.device) -> str | None:
    """What a model's products are rounded to, None where it is float32: another precision is another function.

    Args:
        model: what is evaluated; of accelerated defences in it the dtype is known, of other models nothing.
        device: where it computes.
    """
    parts = model.modules() if isinstance(model, nn.Module) else ()
    settings = [part.acceleration for part in parts if isinstance(part, Defence)]
    if any(each is not None and each["dtype"] == torch.bfloat16 for each in settings):
        return "bfloat16"
    older, values = float32_settings()
    rounds = "tf32" in values if older is None else older != (False, "highest")
    # a CPU rounds nothing, whatever is asked for
    return "tf32" if rounds and device.type == "cuda" else None


def pgd_in_float32(plan: Sequence[AttackSpec], precision: str | None, device: torch.device) -> list[str]:
    """The note of a report whose rows of PGD take their gradients in float32 on a GPU, which the others need not.

    Args:
        plan: the attacks.
        precision: as `precision_name` gives it.
        device: where they run.
    """
    if device.type != "cuda" or precision is not None or not any(isinstance(spec.resolved, PGD) for spec in plan):
        return []
    return [
        "the rows of PGD take their gradients in IEEE float32, which is about 5 times as slow as TF32 in batches of "
        "250 (an estimate, not measured); --precision tf32 of purify-fast evaluate takes TF32 everywhere"
    ]


def threat_name(spec: AttackSpec, context: AttackContext) -> str | None:
    """The attack's threat model in words, None where it is the report's.

    Args:
        spec: the attack.
        context: what the evaluation tells it.

    Raises:
        ValueError: the attack has no such norm.
    """
    norm, eps = spec.resolved.threat_model(context)
    if norm == context.norm and math.isclose(eps, context.eps, rel_tol=1e-6):
        return None
    return ball_name(norm, eps)


def row_name(spec: AttackSpec, context: AttackContext, images: int | None = None) -> str:
    """The row's name, the same for a random model and a deterministic one, so that they stand side by side.

    Args:
        spec: the attack.
        context: what the evaluation tells it.
        images: how many there are: an attack on as many at least is one on all of them, and its name says nothing of a
            number. None: not known.
    """
    name = _own_name(spec, context, images) if spec.label is None else spec.label
    alone = f" {ALONE}" if spec.target == CLASSIFIER and ALONE not in name else ""
    threat = threat_name(spec, context)
    return name + alone + (f", {threat}" if threat is not None and threat not in name else "")


def _own_name(spec: AttackSpec, context: AttackContext, images: int | None) -> str:
    name = spec.resolved.name(context)
    if spec.aggregation is not None:
        name += f" through {spec.aggregation}"
    if spec.target is not None:
        name += f" {ALONE}" if spec.target == CLASSIFIER else " on another model"
    # standard AutoAttack needs a model without randomness anyway: fixed noise goes without saying
    standard = isinstance(spec.resolved, AutoAttack) and spec.resolved.version == "standard"
    if not (standard and spec.variant == "fixed"):
        name += _VARIANTS[spec.variant]
    every = spec.max_images is None or (images is not None and spec.max_images >= images)
    return name + ("" if every else f", first {spec.max_images}")


def short(eps: float) -> str:
    """0.5, 8/255, or a few digits."""
    if float(f"{eps:.2g}") == eps:
        return f"{eps:.2g}"
    levels = 255 * eps
    return f"{levels:.0f}/255" if math.isclose(levels, round(levels), rel_tol=1e-5) else f"{eps:.3g}"
