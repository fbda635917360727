"""The evaluations that the authors of a defence ran, for a comparison with their numbers, never to support a claim.

Give the list of `authors_attacks` to `evaluate` as its ``attacks``.
"""

from __future__ import annotations

from typing import Any

from purify_fast.attacks import OriginalAutoAttack
from purify_fast.defences import WithAggregation
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.atop import Atop
from purify_fast.methods.carso import Carso
from purify_fast.methods.diffusion import DiffusionPurifier

from . import atop_release, diffusion_release


def authors_attacks(defence: Any, eps: float) -> list[AttackSpec]:
    """Return the attacks with which the authors of a defence evaluated it.

    Args:
        defence: a `Carso`, an `Atop` or a `DiffusionPurifier`.
        eps: radius in image units.

    Returns:
        The attacks. The ``judge`` of each is the authors' model, which may differ from the deployed model.

    Raises:
        TypeError: a defence of another kind.
    """
    atop, diffusion = atop_release.authors_attacks, diffusion_release.authors_attacks
    releases = {Carso: _carso, Atop: atop, DiffusionPurifier: diffusion}
    for kind, attacks in releases.items():
        if isinstance(defence, kind):
            return attacks(defence, eps)
    known = ", ".join(kind.__name__ for kind in releases)
    raise TypeError(f"defence must be one of {known}, got {type(defence).__name__}")


def _carso(defence: Carso, eps: float) -> list[AttackSpec]:
    """Return the evaluation of CARSO's authors: AutoAttack, version rand, at the radius of the report.

    AutoAttack attacks the output of PeeL. Another prediction through PeeL decides about the found image. Source:
    src/eval_a.py of emaballarin/CARSO at 307b873, lines 88, 202, 225, 255 and 268.
    """
    label = f"as src/eval_a.py (emaballarin/CARSO): AutoAttack rand through PeeL, K = {defence.samples}"
    peel = WithAggregation(defence, "peel_reference")
    return [AttackSpec(OriginalAutoAttack(version="rand"), label=label, judge=peel)]
