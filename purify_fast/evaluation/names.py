"""The names of rows and of threat models, in the report's words."""

from __future__ import annotations

import math

from ..attacks import AttackContext, AutoAttack
from .specs import CLASSIFIER, AttackSpec
from .subject import Variant

ALONE = "on the classifier alone (not adaptive)"
_NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1", "flow": "flow"}
#: By data set and norm, the radii that most published numbers are about.
USUAL_RADII: dict[str, dict[str, tuple[float, ...]]] = {
    "mnist": {"linf": (0.3,), "l2": (2.0, 1.5), "l1": (10.0,)},
    "fashion_mnist": {"linf": (0.1,), "l2": (1.5,)},
    "cifar10": {"linf": (8 / 255,), "l2": (0.5, 1.0), "l1": (12.0,)},
    "cifar100": {"linf": (8 / 255,), "l2": (0.5,)},
    "svhn": {"linf": (8 / 255,), "l2": (0.5,)},
    "tiny_imagenet": {"linf": (4 / 255, 8 / 255)},
    "imagenette": {"linf": (4 / 255, 8 / 255), "l2": (3.0,)},
}
_VARIANTS: dict[Variant, str] = {"random": "", "fixed": ", fixed noise", "deterministic": ", deterministic"}


def clean_name(variant: Variant) -> str:
    """The name of the row of the clean images."""
    return f"clean{_VARIANTS[variant]}"


def tried_name(attack: str) -> str:
    """The name of the row in which the images of an attack on a variant are tried on the deployed model."""
    return f"{attack}, tried on the deployed defence"


def ball_name(norm: str, eps: float) -> str:
    """A threat model in words, such as ``L-inf 8/255``."""
    return f"{_NORMS[norm]} {short(eps)}"


def unusual_radius(dataset: str | None, norm: str, eps: float) -> list[str]:
    """A note where a radius is not one that others use on this data set; none for an unknown one."""
    known = USUAL_RADII.get(dataset or "", {}).get(norm, ())
    if not known or any(math.isclose(eps, usual, rel_tol=1e-3) for usual in known):
        return []
    usual = " or ".join(ball_name(norm, radius) for radius in known)
    return [f"{ball_name(norm, eps)} is unusual on {dataset}, where most numbers are about {usual}"]


def threat_name(spec: AttackSpec, context: AttackContext) -> str | None:
    """The attack's threat model in words, None where it is the report's; ValueError where it has no such norm."""
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
    # a label may say so itself
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
