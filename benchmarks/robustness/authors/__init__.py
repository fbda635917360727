"""The evaluations that the authors of a defence ran, for a comparison with their numbers, never to support a claim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from purify_fast.attacks import OriginalAutoAttack
from purify_fast.defences import WithAggregation
from purify_fast.evaluation import AttackSpec, Row, evaluate
from purify_fast.judge.request.config import Predict
from purify_fast.methods.atop import Atop
from purify_fast.methods.carso import Carso
from purify_fast.methods.diffusion import DiffusionPurifier
from purify_fast.protocols import draws_for_each_image

from . import atop_release, diffusion_release


class Evaluation(NamedTuple):
    """An evaluation by the authors of a defence.

    Attributes:
        model: the authors' model, which is attacked and judged, and may differ from the deployed model.
        attack: the authors' attack, whose label names the source.
    """

    model: nn.Module
    attack: AttackSpec


class PublishedOutput(WithAggregation):
    """CARSO with the output of its authors, PeeL, whose logits may be infinite."""

    draws_for_each_image = True


def authors_evaluations(defence: Any, eps: float) -> list[Evaluation]:
    """Return the evaluations that the authors of a defence ran.

    Args:
        defence: a `Carso`, an `Atop` or a `DiffusionPurifier`.
        eps: radius in image units.

    Raises:
        TypeError: a defence of another kind.
    """
    atop, diffusion = atop_release.evaluations, diffusion_release.evaluations
    releases = {Carso: _carso, Atop: atop, DiffusionPurifier: diffusion}
    for kind, evaluations in releases.items():
        if isinstance(defence, kind):
            return [Evaluation(*pair) for pair in evaluations(defence, eps)]
    known = ", ".join(kind.__name__ for kind in releases)
    raise TypeError(f"defence must be one of {known}, got {type(defence).__name__}")


def rows_of(evaluations: Sequence[Evaluation], x: Tensor, y: Tensor, *, eps: float) -> list[Row]:
    """Run evaluations, in which a single prediction judges each image, and return the row of each attack."""
    rows = []
    for model, attack in evaluations:
        # With a single prediction the rule "worst_of" changes no number. But the evaluation then takes a model as
        # random if its class says so, also if infinite logits hide the draws.
        rule: Predict | None = "worst_of" if draws_for_each_image(model) else None
        how: dict[str, Any] = {"n_eval": 1, "predict": rule, "probes": False, "progress": False}
        report = evaluate(model, x, y, eps=eps, attacks=[attack], **how)
        rows += [row for row in report.rows if row.is_attack]
    return rows


def _carso(defence: Carso, eps: float) -> list[tuple[nn.Module, AttackSpec]]:
    """Return the evaluation of CARSO's authors: AutoAttack, version rand, at the radius of the report.

    AutoAttack attacks the output of PeeL. Another prediction through PeeL decides about the found image. Source:
    src/eval_a.py of emaballarin/CARSO at 307b873, lines 88, 202, 225, 255 and 268.
    """
    label = f"as src/eval_a.py (emaballarin/CARSO): AutoAttack rand through PeeL, K = {defence.samples}"
    return [(PublishedOutput(defence, "peel_reference"), AttackSpec(OriginalAutoAttack(version="rand"), label=label))]
