"""The curve of robust accuracy over the radius of the ball.

An image that fell at a radius counts as fallen at all larger radii, and an image that withstood the report's radius as
robust at all smaller radii. On a random model nothing is concluded from another radius: every image that has not fallen
at a smaller radius is attacked, and other draws judge its worst point (`results.rows.by_worst_points`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..._tensors import digest
from ...attacks import AttackContext, GradientHealth
from ...attacks.engine.judge import has_fallen
from ...protocols import Passes
from ..request.naming import ball_name, clean_name, row_name, threat_name
from ..request.specs import AttackSpec, FunctionAttack
from ..results.rows import Row, Worst, by_worst_points
from .attack_run import counts_of
from .measure import Measure, settings_of


def radii_of(curve: Sequence[float], eps: float, largest: float) -> list[float]:
    """The radii of a curve in rising order, without the report's radius."""
    for radius in curve:
        # The comparison is negated so that NaN is refused too.
        if not 0 < radius <= largest:
            raise ValueError(f"curve must be radii above 0 and at most {largest:g}, got {radius}")
    return sorted({*map(float, curve)} - {float(eps)})


def attacks_of_curve(plan: Sequence[AttackSpec], context: AttackContext, radii: Sequence[float]) -> list[AttackSpec]:
    """Select the attacks on the deployed model that can be run at any radius, and that have no ``max_images``."""
    chosen = [spec for spec in plan if _fits(spec)]
    if radii and not chosen:
        raise ValueError("curve needs an attack without eps, variant, judge and max_images, such as APGD()")
    names = {ball_name(context.norm, radius) for radius in radii}
    for spec in plan:
        if (threat := threat_name(spec, context)) in names:
            raise ValueError(f"curve must not contain {threat}, which {row_name(spec, context)} already has")
    return chosen


def _fits(spec: AttackSpec) -> bool:
    attack = spec.resolved
    movable = attack.norms and not isinstance(attack, FunctionAttack) and getattr(attack, "eps", None) is None
    return bool(movable) and spec.variant == "random" and spec.judge is None and spec.max_images is None


@dataclass(frozen=True)
class Curve:
    """The attacks of a curve and its rising radii, without the report's radius; there may be no radii."""

    specs: Sequence[AttackSpec]
    radii: Sequence[float]

    def specs_at(self, radius: float, norm: str) -> list[AttackSpec]:
        """Return the attacks of the curve with this radius."""
        return [replace(spec, attack=replace(spec.resolved, eps=radius, norm=norm)) for spec in self.specs]  # type: ignore[call-arg]

    def costs(self, context: AttackContext) -> list[Passes | None]:
        """Return the largest numbers of passes per image for each radius; None if a number is unknown."""
        costs = [spec.resolved.cost(context) for spec in self.specs]
        return [None if None in costs else sum((cost or Passes() for cost in costs), Passes())] * len(self.radii)

    def rows(self, measure: Measure, attacks: Sequence[Row]) -> list[Row]:
        """Make a row for each radius, with the images that withstand all attacks."""
        eps, rows = float(measure.context.eps), list[Row]()
        clean, chooses = measure.clean("random"), measure.chooses("random")
        at_start = measure.withstood(clean)
        left = np.logical_and.reduce([at_start, *(measure.withstood(row) for row in attacks)])
        for below in (True, False):
            side = [radius for radius in self.radii if (radius < eps) is below]
            # An image that withstood at the report's radius counts as robust at every smaller radius. An image that
            # fell at the report's radius counts as fallen at every larger radius.
            safe = left if below and not chooses else np.zeros_like(left)
            standing = at_start & ~safe if below else left
            # A point in a smaller ball is also a point of this ball.
            smaller = [clean] if below else [clean, *rows, *attacks]
            x, begin = measure.subject.x, None
            for radius, following in itertools.zip_longest(side, side[1:]):
                row = self._row(radius, measure, standing=standing, safe=safe, begin=begin, smaller=smaller)
                rows.append(row)
                smaller.append(row)
                standing = measure.withstood(row) & standing & ~safe
                if following is not None:
                    # The attacks at the next radius begin at the best points of this radius, scaled to the next radius.
                    points = x.clone()
                    points[torch.from_numpy(standing)] = torch.from_numpy(row.points).to(x.device)
                    begin = x + (points - x) * (following / radius)
                row.points = None
        return rows

    def _row(
        self,
        radius: float,
        measure: Measure,
        *,
        standing: np.ndarray,
        safe: np.ndarray,
        begin: Tensor | None,
        smaller: Sequence[Row],
    ) -> Row:
        """Make the row of a radius, with the best points of the images that withstand."""
        subject, norm, chooses = measure.subject, measure.context.norm, measure.chooses("random")
        at_radius = self.specs_at(radius, norm)
        over, n_eval = [row_name(spec, measure.context) for spec in at_radius], subject.judges("random")
        settings = {"over": over, "norm": norm, "eps": radius, "n_eval": n_eval}
        known = by_worst_points(smaller, len(standing)) if chooses else None

        def make() -> Row:
            alive, health, seconds, best = standing.copy(), GradientHealth(), 0.0, subject.x.clone()
            wrong, lead = np.zeros(len(alive)), np.full(len(alive), np.inf, dtype=np.float32)
            largest = np.finfo(lead.dtype).max
            for spec in at_radius:
                if not alive.any():
                    break
                at = np.flatnonzero(alive)
                index = torch.from_numpy(at)
                order = measure.in_order(spec, index, lead)
                sums = measure.attack(spec, order, begin=begin)[1]
                judged = subject.judge(sums.images[index], "random", "choose" if chooses else "judge", index=index)
                # For each image, the point with the largest share of wrong draws is kept, and among equal shares the
                # point with the smallest margin. NaN counts as the largest margin.
                margins = np.nan_to_num(judged.margins, nan=largest)
                better = (judged.wrong > wrong[at]) | ((judged.wrong == wrong[at]) & (margins < lead[at]))
                closer = at[better]
                best[closer] = sums.images[closer]
                lead[closer], wrong[closer] = margins[better], judged.wrong[better]
                alive[at] = ~has_fallen(torch.from_numpy(judged.wrong), measure.context.judge_share).numpy()
                health.add(**sums.health.counts)
                seconds += sums.seconds
            row = measure.new_row(
                (alive | safe)[None],
                attack="",
                kind="worst",
                variant="random",
                seconds=seconds,
                health=counts_of(health),
                reliable=health.reliable,
                settings=settings,
                attacked=int(measure.withstood(measure.clean("random")).sum()),
                points=best[torch.from_numpy(alive)].cpu().numpy(),
            )
            row.n_eval = n_eval
            if known is not None:
                # Images that this radius does not attack have the largest margin, so an earlier point counts.
                right = subject.judge(best, "random", "judge").right
                row.count(known.or_worse(Worst(wrong, np.nan_to_num(lead), right.sum(0))))
                row.points = best[torch.from_numpy(standing & measure.withstood(row))].cpu().numpy()
            return row

        given = [digest(torch.from_numpy(mask)) for mask in (standing, safe)]
        given += [] if begin is None else [digest(begin)]
        given += [] if known is None else [digest(*map(torch.from_numpy, known))]
        details = [settings_of(spec, subject, measure.context) for spec in at_radius]
        row = measure.load_or_make(settings | {"attacks": details, "images": given}, at_radius, make)
        row.threat = ball_name(norm, radius)
        row.attack = f"worst, {row.threat}"
        measure.progress.next_row()
        measure.progress.finished(f"{row.attack}: {100 * row.accuracy:.1f} % of {row.n} images")
        return row

    def points(self, rows: Sequence[Row], eps: float) -> list[list[float]]:
        """Return the curve of a report as pairs of radius and accuracy; radius 0 stands for the clean images."""
        named = {row.attack: row.accuracy for row in rows}
        at_radius = {row.settings["eps"]: row.accuracy for row in rows if row.kind == "worst" and "eps" in row.settings}
        points = {0.0: named[clean_name("random")], eps: named["worst"]} | at_radius
        return [list(point) for point in sorted(points.items())]
