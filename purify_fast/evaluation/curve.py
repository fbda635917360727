"""The accuracy over the radius of the ball, from radius to radius.

What fell within a smaller ball has fallen within a larger one, and what withstood in the report's ball counts as right
within the smaller ones. So an image is attacked at the radii below the report's only if it fell there, and at those
above only if it did not, until it falls. The accuracy can only fall with the radius.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._tensors import digest
from .._validation import check_number
from ..attacks import AttackContext, GradientHealth
from ..attacks.base import BallAttack
from .cache import PartialRow
from .measure import Measure
from .plan import ball_name, clean_name, row_name, short, threat_name
from .rows import CURVE, Row
from .specs import AttackSpec, FunctionAttack

#: Raised whenever a row of a radius would come out differently: kept rows are used again by this number.
REVISION = 1


def radii_of(curve: Sequence[float], eps: float, largest: float) -> list[float]:
    """The radii of a curve in rising order, without the report's own.

    Args:
        curve: radii in image units.
        eps: the report's radius.
        largest: what a radius may be at most.

    Raises:
        TypeError: a radius that is no number.
        ValueError: a radius that is not above 0, or too large, or several that a report would call by one name.
    """
    for radius in curve:
        check_number("each of curve", radius)
        # written so that NaN is refused too
        if not 0 < radius <= largest:
            raise ValueError(f"curve must be radii above 0 and at most {largest:g}, got {radius}")
    radii = sorted({float(eps), *map(float, curve)})
    for one, other in itertools.pairwise(radii):
        if short(one) == short(other):
            raise ValueError(f"curve must be radii of different names, got {one} and {other}, both named {short(one)}")
    radii.remove(float(eps))
    return radii


def attacks_of_curve(plan: Sequence[AttackSpec], context: AttackContext, radii: Sequence[float]) -> list[AttackSpec]:
    """Those attacks of a plan that can be run at any radius, on all images, on the model as it is deployed.

    Args:
        plan: the attacks of the report.
        context: what they are told.
        radii: of the curve.

    Raises:
        ValueError: there are radii and no such attack, or an attack has one of these radii as its own.
    """
    chosen = [spec for spec in plan if _fits(spec)]
    if radii and not chosen:
        raise ValueError(
            "curve needs an attack of purify_fast.attacks without an eps of its own, on all images, on the model as it "
            "is deployed: the protocols fast, standard, rand and strong have some"
        )
    names = {ball_name(context.norm, radius) for radius in radii}
    for spec in plan:
        if (threat := threat_name(spec, context)) in names:
            raise ValueError(f"curve must leave out {threat}, which {row_name(spec, context)} has as its own ball")
    return chosen


def _fits(spec: AttackSpec) -> bool:
    attack = spec.resolved
    movable = isinstance(attack, BallAttack) and not isinstance(attack, FunctionAttack) and attack.eps is None
    return movable and spec.variant == "random" and spec.judge is None and spec.max_images is None


@dataclass(frozen=True)
class Curve:
    """The attacks of a curve and its radii.

    Args:
        specs: the attacks, in their order.
        radii: rising, without the report's own; empty: there is no curve.
    """

    specs: Sequence[AttackSpec]
    radii: Sequence[float]

    def specs_at(self, radius: float, norm: str) -> list[AttackSpec]:
        """The attacks at one of the radii."""
        return [replace(spec, attack=replace(spec.resolved, eps=radius, norm=norm)) for spec in self.specs]  # type: ignore[call-arg]

    def costs(self, context: AttackContext) -> list[int | None]:
        """Forward passes per image at most, for each radius; None where that is not known."""
        costs = [spec.resolved.cost(context) for spec in self.specs]
        return [None if None in costs else sum(cost or 0 for cost in costs)] * len(self.radii)

    def rows(self, measure: Measure, left: np.ndarray) -> list[Row]:
        """A row for each radius: what is right after every attack.

        Args:
            measure: what makes rows, of the images in question.
            left: bool ``[n]``, which images the attacks of the report left right.
        """
        eps, rows = float(measure.context.eps), []
        for side in ([r for r in self.radii if r < eps], [r for r in self.radii if r > eps]):
            below = bool(side) and side[0] < eps
            # below the report's radius what withstood there is safe, and above it what fell there has fallen
            safe = left if below else np.zeros_like(left)
            standing = measure.clean("random").robust & ~left if below else left
            before: tuple[float, Tensor] | None = None
            for radius in side:
                at_radius = self.specs_at(radius, measure.context.norm)
                row = _row(at_radius, radius, measure, Images(standing, safe, before))
                rows.append(row)
                standing = row.robust & ~safe
                points = measure.subject.x.clone()
                points[torch.from_numpy(standing)] = torch.from_numpy(row.points).to(points.device)
                before, row.points = (radius, points), None
        return rows

    def points(self, rows: Sequence[Row], name: str, eps: float) -> dict[str, dict[str, list[list[float]]]]:
        """The curve as a report holds it: radii and accuracies, from the clean images on.

        Args:
            rows: of the report.
            name: of the model.
            eps: the report's radius.
        """
        if not self.radii:
            return {}
        named = {row.attack: row.accuracy for row in rows}
        at_radius = {row.settings["eps"]: row.accuracy for row in rows if row.kind == "worst" and "eps" in row.settings}
        points = {0.0: named[clean_name("random")], eps: named["worst"]} | at_radius
        return {name: {CURVE: [list(point) for point in sorted(points.items())]}}


class Images(NamedTuple):
    """Which images are attacked at a radius, and where that begins."""

    #: Bool ``[n]``: those that are attacked.
    standing: np.ndarray
    #: Bool ``[n]``: those that count as right without being attacked.
    safe: np.ndarray
    #: The radius before, and the best points there, ``[n, C, H, W]``; None at the first one.
    before: tuple[float, Tensor] | None


def _row(at_radius: Sequence[AttackSpec], radius: float, measure: Measure, images: Images) -> Row:
    """The row of a radius, with the best points of the images that still stand."""
    standing, safe, before = images
    subject, norm = measure.subject, measure.context.norm
    begin = None
    if before is not None:
        begin = subject.x + (before[1] - subject.x) * (radius / before[0])
    over = [row_name(spec, measure.context) for spec in at_radius]
    settings: dict[str, Any] = {
        "over": over, "norm": norm, "eps": radius, "attacked": int(measure.clean("random").robust.sum()),
        "n_eval": subject.judges("random"),
    }  # fmt: skip

    def make(_: PartialRow) -> Row:
        alive, health, seconds = standing.copy(), Counter[str](), 0.0
        best, lead = subject.x.clone(), torch.full((len(alive),), torch.inf)
        for spec in at_radius:
            if not alive.any():
                break
            index = torch.from_numpy(alive).nonzero()[:, 0]
            order = measure.in_order(spec, index, lead.numpy())
            sums = measure.attack(spec, order, PartialRow(None), begin).sums
            judged = subject.judge(sums.images[index], "random", "judge", index=index)
            # The point of the smallest lead is nearest to falling. A lead that is no number is larger than any other,
            # and still better than none.
            margins = torch.from_numpy(judged.margins).nan_to_num(torch.finfo(lead.dtype).max)
            closer = index[margins < lead[index]]
            best[closer] = sums.images[closer]
            lead[index] = torch.minimum(lead[index], margins)
            alive[index] = judged.right.all(0)
            health.update(sums.health)
            seconds += sums.seconds
        robust = alive | safe
        share = float(robust.mean())
        return Row(
            model=measure.name, attack="", kind="worst", variant="random", robust=robust, mean=share, worst=share,
            n_eval=subject.judges("random"), seed=subject.seed, seconds=seconds, data=subject.data,
            health=dict(health) if health["gradients"] else None, reliable=GradientHealth(dict(health)).reliable,
            settings=settings, points=best[torch.from_numpy(alive)].cpu().numpy(),
        )  # fmt: skip

    given = [digest(torch.from_numpy(mask)) for mask in (standing, safe)]
    given += [] if begin is None else [digest(begin)]
    details = [measure.settings_of(spec) for spec in at_radius]
    row = measure.kept(settings | {"curve": REVISION, "attacks": details, "images": given}, at_radius, make)
    row.threat = ball_name(norm, radius)
    row.attack = f"worst, {row.threat}"
    measure.progress.next_row()
    measure.progress.finished(f"{row.attack}: {100 * row.accuracy:.1f} % of {row.n} images")
    return row
