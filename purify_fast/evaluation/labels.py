"""The names of rows: what was run, on what, in which threat model."""

from __future__ import annotations

import math

from ..attacks import TARGETED
from ..attacks.autoattack import parts
from .kinds import Context, ball_of, loss_of
from .specs import CLASSIFIER, Attack

ALONE = "on the classifier alone (not adaptive)"
_NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1", "flow": "flow"}


def ball_name(norm: str, eps: float) -> str:
    """A threat model in words, such as ``L-inf 8/255``."""
    return f"{_NORMS[norm]} {short(eps)}"


def threat_name(attack: Attack, context: Context) -> str | None:
    """The attack's threat model in words, None where it is the report's."""
    norm, eps = ball_of(attack, context)
    if norm == context.norm and math.isclose(eps, context.eps, rel_tol=1e-6):
        return None
    return ball_name(norm, eps)


def row_name(attack: Attack, context: Context) -> str:
    """The row's name, the same for a randomised model and a deterministic one, so that they stand side by side."""
    name = _own_name(attack, context) if attack.label is None else attack.label
    alone = f" {ALONE}" if attack.target == CLASSIFIER and ALONE not in name else ""
    threat = threat_name(attack, context)
    return name + alone + (f", {threat}" if threat is not None and threat not in name else "")


def _own_name(attack: Attack, context: Context) -> str:
    some = f", first {attack.limit}" if attack.limit is not None else ""
    if attack.kind == "autoattack":
        name = f"AutoAttack {attack.version}"
        steps = f", {attack.steps} steps" if attack.steps not in (None, 100) else ""
        steps += f", {attack.queries} queries" if attack.version == "standard" and attack.queries != 5000 else ""
        run, replaced = parts(attack.version, context.num_classes)
        if replaced is not None:
            steps += f" ({' + '.join(run)}; PGD margin for {replaced}: {context.num_classes} classes)"
        name += steps
    else:
        loss, count = loss_of(attack, context), attack.steps or context.steps
        kind = "StAdv" if attack.kind == "stadv" else attack.kind.upper()
        name = f"FGSM {loss}" if attack.kind == "fgsm" else f"{kind}-{count} {loss}"
        if loss in TARGETED:
            name = f"APGD-T {count}" + (f", {attack.targets} targets" if attack.targets != 9 else "")
        name += f" x{attack.restarts}" if attack.restarts > 1 else ""
    if attack.head is not None:
        name += f" through {attack.head}"
    if attack.target is not None:
        name += f" {ALONE}" if attack.target == CLASSIFIER else " on another model"
    # standard AutoAttack needs a deterministic model anyway
    standard = attack.kind == "autoattack" and attack.version == "standard"
    if attack.variant == "deterministic" or (attack.variant == "fixed" and not standard):
        name += {"fixed": ", fixed noise", "deterministic": ", deterministic"}[attack.variant]
    return name + some


def clean_name(variant: str) -> str:
    """The name of the row of the clean images."""
    return {"random": "clean", "fixed": "clean, fixed noise", "deterministic": "clean, deterministic"}[variant]


def short(eps: float) -> str:
    """0.5, 8/255, or a few digits."""
    if float(f"{eps:.2g}") == eps:
        return f"{eps:.2g}"
    levels = 255 * eps
    return f"{levels:.0f}/255" if math.isclose(levels, round(levels), rel_tol=1e-5) else f"{eps:.3g}"
