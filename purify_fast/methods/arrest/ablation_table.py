"""The table and the picture of an ablation."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..._files import write_text
from ...evaluation import Tradeoff, ar_point_dist, plot_tradeoff
from ...evaluation.show.tables import markdown_table
from ...training import TrainingAttack
from .config import AblationConfig


@dataclass(frozen=True)
class Result:
    """What one row found, in percent.

    Args:
        pgd: clean accuracy and that under PGD, of all images.
        pgd_errors: their standard errors.
        auto: clean accuracy and that under AutoAttack, of AutoAttack's images, if it ran.
        auto_errors: their standard errors.
    """

    pgd: Tradeoff
    pgd_errors: tuple[float, float]
    auto: Tradeoff | None = None
    auto_errors: tuple[float, float] = (0.0, 0.0)

    @property
    def point(self) -> Tradeoff:
        """What SUM and the other trade-offs are of."""
        return self.pgd if self.auto is None else self.auto

    @property
    def errors(self) -> tuple[float, float]:
        """The standard errors of `point`."""
        return self.pgd_errors if self.auto is None else self.auto_errors


def best_points(points: Sequence[Tradeoff]) -> list[Tradeoff]:
    """Those of the points that no other beats in both accuracies, by rising standard accuracy."""
    kept = [p for p in points if not any(q != p and q.standard >= p.standard and q.robust >= p.robust for q in points)]
    return sorted(dict.fromkeys(kept), key=lambda point: point.standard)


def write(
    out: Path, found: Mapping[str, Result], reference: Sequence[str], attack: TrainingAttack, what: AblationConfig
) -> list[Path]:
    """Write ``ablation.md``, ``ablation.csv`` and, with matplotlib, ``ablation.png``.

    Args:
        out: folder.
        found: the rows by their names.
        reference: the names of the rows that the others are compared with.
        attack: whose ball the images were attacked in.
        what: which attacks ran.

    Returns:
        What was written, the table first.
    """
    curve = best_points([found[name].point for name in reference])
    auto = what.autoattack > 0
    head = ["model", "standard", "robust"] + (["standard, AutoAttack's images", "AutoAttack"] if auto else [])
    head += ["SUM", "mean", "NRR", "ar_point_dist"]
    table: list[list[str]] = []
    for name, result in found.items():
        point = result.point
        far = f"{ar_point_dist(curve, point):+.2f}" if len(curve) > 1 and name not in reference else "-"
        pairs = list(zip(result.pgd, result.pgd_errors, strict=True))
        pairs += [] if result.auto is None else list(zip(result.auto, result.auto_errors, strict=True))
        sums = [f"{value:.2f}" for value in (point.sum, point.mean, point.nrr)]
        table.append([name, *(f"{value:.1f} ± {error:.1f}" for value, error in pairs), *sums, far])
    robust = f"AutoAttack, first {what.autoattack} images" if auto else f"PGD-{what.attack_steps}"
    text = [
        f"Accuracy ± standard error, %; the first {what.images} test images, {attack.norm} eps {attack.eps:.4g}; "
        f"robust: PGD-{what.attack_steps} with cross-entropy, then with DLR on what that left. "
        + (f"AutoAttack: standard, then, on the first {what.autoattack}. " if auto else "")
        + f"SUM, mean, NRR and ar_point_dist: of standard accuracy and {robust}. "
        "ar_point_dist (this package's own; inspired by, and not, the paper's ARDist): signed distance in points to "
        f"the curve through {', '.join(f'({p.standard:.1f}, {p.robust:.1f})' for p in curve)}, those of "
        f"{'; '.join(reference)} that no other of them beats.",
        "",
        *markdown_table(head, table),
    ]
    written = [out / "ablation.md", out / "ablation.csv"]
    write_text(written[0], "\n".join(text) + "\n")
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head, *table])
    write_text(written[1], file.getvalue())
    points = {name: (*result.point, *result.errors) for name, result in found.items()}
    shown = curve if len(curve) > 1 else None
    drawn = plot_tradeoff(
        out / "ablation.png", points, shown, reference_name="trained from scratch", title=f"robust: {robust}"
    )
    return [*written, out / "ablation.png"] if drawn else written
