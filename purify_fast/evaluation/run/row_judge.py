"""Judges the images of attacks by new predictions, and makes rows of the predictions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...attacks import AttackContext
from ...attacks.engine.judge import has_fallen
from ..request.naming import row_name
from ..request.subject import Judgement, Subject, Variant
from ..results.rows import AUTHORS, Examples, Row, Worst, by_worst_points
from .attack_run import AttackedBatch, AttackRun

#: The number of attacked images that each row stores for the pictures.
EXAMPLES = 8


@dataclass(frozen=True)
class RowJudge:
    """Makes rows from predictions of a subject."""

    subject: Subject
    context: AttackContext
    name: str
    keep_all: bool = False

    def chooses(self, variant: Variant) -> bool:
        """Tell whether points are chosen by other draws than those that judge: only for a random model as deployed."""
        return variant == "random" and self.subject.is_random

    def withstood(self, row: Row) -> np.ndarray:
        """Tell which images have not fallen, bool ``[n]``."""
        if row.wrong is None:
            return row.robust
        return ~has_fallen(torch.from_numpy(row.wrong), self.context.judge_share).numpy()

    def new_row(self, right: np.ndarray, **values: Any) -> Row:
        """Make a row from predictions."""
        usual: dict[str, Any] = {
            "model": self.name,
            "robust": np.asarray(right.all(0)),
            "right": right.sum(0) if len(right) > 1 else None,
            "of_draws": right.mean(1).tolist() if self.subject.draws_once_per_call and len(right) > 1 else [],
            "n_eval": len(right),
            "seed": self.subject.seed,
            "seconds": 0.0,
            "data": self.subject.data,
        }
        return Row(**usual | values)

    def judged(
        self,
        run: AttackRun,
        sums: AttackedBatch,
        settings: dict[str, Any],
        alive: np.ndarray,
        points: Sequence[Row],
    ) -> Row:
        """Judge the images of an attack, and make the row."""
        begin, spec, variant = time.perf_counter(), run.spec, settings["variant"]
        self.subject.check_repeats(sums.images[run.index], variant)
        judged = self.subject.judge(sums.images, variant, "judge", spec.judge)
        # The number of draws is recorded here, because it is 1 if the target turned out to be deterministic.
        draws = {name: value for name, value in spec.resolved.settings(run.context).items() if name == "eot_iter"}
        stopped = {} if run.rule is None else {"unsearched": run.rule.unsearched, "may_hold": run.rule.may_hold}
        row = self.new_row(
            judged.right & alive,
            attack=row_name(spec, self.context),
            kind=spec.resolved.kind if spec.judge is None else AUTHORS,
            variant=variant,
            reliable=sums.health.reliable,
            settings=settings | draws,
            attacked=len(run.index),
            warnings=sums.warnings,
            fell_to=sums.fallen,
            proved=sums.proved,
            may_end_early=spec.resolved.may_end_early(run.context),
            **stopped,
            nonfinite_predictions=judged.nonfinite,
            margins=judged.margins,
        )
        fallen = run.index[torch.from_numpy(~row.robust)[run.index]]
        if spec.judge is None and self.chooses(variant):
            fallen = self._choose_points(row, judged, run, sums.images, points)
        row.examples = self._examples(run.index, fallen, sums.images, judged)
        row.seconds = time.perf_counter() - begin
        return row

    def _choose_points(
        self, row: Row, judged: Judgement, run: AttackRun, images: Tensor, points: Sequence[Row]
    ) -> Tensor:
        """Choose the points that a row of a random model counts."""
        n, index = len(images), run.index
        clean = Worst.of_row(points[0], n)
        own = Worst(clean.wrong.copy(), clean.margins.copy(), judged.right.sum(0))
        if len(index):
            chosen = self.subject.judge(images[index], "random", "choose", index=index)
            own.wrong[index.numpy()], own.margins[index.numpy()] = chosen.wrong, chosen.margins
        known = by_worst_points(points, n)
        row.of_draws = judged.right.mean(1).tolist() if row.of_draws else []
        row.count(known.or_worse(own) if run.spec.survivors_only else own)
        found = own.is_worse(known) if self.keep_all else own.wrong > 0.5
        return index[torch.from_numpy(found)[index]]

    def _examples(self, index: Tensor, fallen: Tensor, images: Tensor, judged: Judgement) -> Examples | None:
        """Select the images that a row stores: some or all of the fallen images, or some others if no image fell."""
        subject = self.subject
        fallen = fallen if self.keep_all else fallen[:EXAMPLES]
        shown = fallen if len(fallen) else index[:EXAMPLES]
        if len(shown) == 0:
            return None
        return Examples(
            clean=subject.x[shown].cpu().numpy(),
            adversarial=images[shown].cpu().numpy(),
            labels=subject.y[shown.to(subject.y.device)].cpu().numpy(),
            fell=np.full(len(shown), len(fallen) > 0),
            predicted=judged.classes[shown.numpy()],
            index=shown.numpy() if self.keep_all else None,
        )
