"""The attacks that others published for a defence: those of its authors, and those on defences of its kind.

A model of your own can define them by `purify_fast.protocols.AuthorsEvaluation` and `purify_fast.protocols.OwnAttacks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ....attacks import OriginalAutoAttack
from ....defences import WithAggregation
from ....protocols import AuthorsEvaluation, OwnAttacks, supports
from ..specs import AttackSpec


def authors_attacks(model: Any, eps: float) -> Sequence[AttackSpec] | None:
    """Return the attacks of the authors' evaluation of a model; None if there is none."""
    if supports(model, AuthorsEvaluation):
        return list(cast(AuthorsEvaluation, model).authors_attacks(eps))
    # No other protocol needs these modules.
    from ....methods.atop import Atop
    from ....methods.carso import Carso
    from ....methods.diffusion import DiffusionPurifier
    from . import atop_release, diffusion_release

    atop, diffusion = atop_release.authors_attacks, diffusion_release.authors_attacks
    releases: dict[type, Any] = {Carso: _carso, Atop: atop, DiffusionPurifier: diffusion}
    return next((attacks(model, eps) for kind, attacks in releases.items() if isinstance(model, kind)), None)


def strong_attacks(model: Any, norm: str, eps: float) -> Sequence[AttackSpec] | None:
    """Return the attacks that the protocol "strong" adds for a model; None if there are none for its kind."""
    if supports(model, OwnAttacks):
        return list(cast(OwnAttacks, model).strong_attacks(norm, eps))
    from ....methods.diffusion import DiffusionPurifier
    from . import diffusion_release

    return diffusion_release.strong_attacks(model, norm, eps) if isinstance(model, DiffusionPurifier) else None


def _carso(defence: Any, eps: float) -> list[AttackSpec]:
    """Return the evaluation of CARSO's authors: AutoAttack, version rand, at the radius of the report.

    AutoAttack attacks the output of PeeL. Another prediction through PeeL decides about the found image. Source:
    src/eval_a.py of emaballarin/CARSO at 307b873, lines 88, 202, 225, 255 and 268.
    """
    label = f"as src/eval_a.py (emaballarin/CARSO): AutoAttack rand through PeeL, K = {defence.samples}"
    return [
        AttackSpec(OriginalAutoAttack(version="rand"), label=label, judge=WithAggregation(defence, "peel_reference"))
    ]
