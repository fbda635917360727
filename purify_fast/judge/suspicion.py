"""Runs the probes of an evaluation, and lets the alarms judge whether its numbers are reliable."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from .._hashes import digest
from ..attacks.context import TimeIsOver
from .alarms.probes import PROBED, Before, Probes, compared_gradients, has_no_gradient, measure_before_attacks, probe
from .alarms.signs import Evidence, findings, signs_of_masking
from .results.rows import Points, Row, worst_rows
from .run.measure import Measure, counted_model
from .show.report import Report


@dataclass
class Suspicion:
    """The probes and the alarms of an evaluation; ``compares``: compare gradients even without probes."""

    report: Report
    measure: Measure
    before: Before | None
    compares: bool = True

    def conclude(self, measured: Probes | None) -> None:
        """Add the ``worst`` rows, the alarms' findings and the probes' curves to the report, and mark doubtful rows."""
        report, subject, name = self.report, self.measure.subject, self.measure.name
        evidence = Evidence(report.rows, None, subject.num_classes, subject.has_probabilities, subject.has_one_hot)
        probed = None
        if self.before is not None and measured is not None:
            probes = self.all_probes(self.before, measured, evidence)
            evidence = replace(evidence, probes=probes)
            probed = self.column(probes)
            report.curves |= probes.curves()
        else:
            with contextlib.suppress(TimeIsOver):
                evidence = replace(evidence, **self.about_gradients(evidence))
        report.rows = [*report.rows, *worst_rows(report.rows, probed)]
        report.findings = [replace(finding, model=name) for finding in findings(evidence)]
        doubts = [finding for finding in report.findings if finding.verdict == "unreliable"]
        inconsistent = any(finding.of_answers for finding in doubts)
        # If no attack counted gradients, the headline is still reliable if the probes could use the model's gradients.
        followed = evidence.probes is not None and not evidence.with_counted_gradients() and not evidence.blind()
        for row in report.rows:
            # An accuracy of 0 % cannot be too high, so only inconsistent predictions are then a reason for doubt.
            headline = row.kind == "worst" and row.threat is None
            row.reliable = row.reliable or (headline and followed)
            if headline and doubts and (row.accuracy > 0 or inconsistent):
                row.reliable = False
                row.doubts = [finding.alarm for finding in doubts]

    def about_gradients(self, evidence: Evidence) -> dict[str, Any]:
        """Compare or look for gradients without the probes; the result are fields of the evidence."""
        subject = self.measure.subject
        counted = evidence.with_counted_gradients()
        if any(row.lacked_gradients for row in counted):
            # The rows only count gradients of zeros. The probes would have told why.
            return {"no_gradient": has_no_gradient(subject)}
        # The gradients of BPDA and of surrogates are approximations by design.
        approximate = getattr(type(subject.base_model), "approximates_gradients", False)
        if approximate or not self.compares or all(row.settings.get("through") for row in counted):
            return {}
        return {"cosine": subject.batch_limit.within(lambda: compared_gradients(subject, self.measure.context))}

    def column(self, probes: Probes) -> Row:
        """The column of the probes: the points of the images that fell to them, and the clean points of the others."""
        subject, row = self.measure.subject, replace(self.measure.clean)
        # On a random model, a probe's point also counts if it is worse than the points of the attacks.
        fallen = torch.tensor(probes.found() if subject.is_random else probes.fallen(), dtype=torch.int64, device="cpu")
        wrong, margins, right = row.points.at(fallen.numpy())
        points = Points(np.ones_like(wrong), np.full_like(margins, -np.inf), np.zeros_like(right))
        if probes.points is not None and len(fallen):
            images = probes.points[fallen].to(subject.x.device)
            chosen, judged = (subject.judge(images, phase, fallen) for phase in ("choose", "judge"))
            points = Points(chosen.wrong, chosen.margins, judged.right)
        row.take(row.points.put(fallen.numpy(), points))
        return row

    def probes_key(self, more: dict[str, Any]) -> str | None:
        """Return the cache's name for the probes' results, a hash of the probes' settings and of ``more``."""
        context, subject = self.measure.context, self.measure.subject
        ball = [context.eps, context.norm, context.eot_iter, context.batch_size, context.max_forward_batch]
        settings = {"probes": [PROBED, subject.data, subject.seed, subject.is_random, *ball]}
        return self.measure.cache.key(settings | more, subject.model)

    def measure_before_attacks(self, before: Before) -> Probes | None:
        """Run the probes before the attacks, in the first process; each is kept as soon as it is made.

        The result is None if the time was over before the first images were probed.
        """
        measure, subject, progress = self.measure, self.measure.subject, self.measure.progress
        model = counted_model(subject.model, progress)

        def keep(name: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            def shown() -> dict[str, Any]:
                progress.total += 1
                with progress.row(f"probe: {name}"):
                    result = make()
                progress.rows += 1
                return result

            return measure.cache.values(self.probes_key({"probe": name} | settings), shown)

        def values() -> dict[str, Any] | None:
            settled = functools.partial(signs_of_masking, is_random=True)

            def ask() -> Probes:
                return measure_before_attacks(before, measure.context, model, keep, settled)

            # If memory runs out, the probes run again with fewer images at once.
            with contextlib.suppress(TimeIsOver):
                return asdict(subject.batch_limit.within(ask))
            return None

        result = measure.shards.from_first(values)
        return None if result is None else Probes(**result)

    def all_probes(self, before: Before, measured: Probes, evidence: Evidence) -> Probes:
        """Return the results of all probes; cached results are used only if the attacks before them were the same."""
        wrong = evidence.wrong(measured.n)
        # The images that withstood every attack; without an attack, none.
        left = np.zeros(measured.n, dtype=bool) if wrong is None else wrong == 0
        measured = replace(measured, left=left.tolist())
        key = self.probes_key({"attacks": [row.attack for row in evidence.rows], "left": digest(torch.tensor(left))})
        ask = functools.partial(probe, before, self.measure.context, measured)
        with contextlib.suppress(TimeIsOver):
            limit = self.measure.subject.batch_limit
            return Probes(**self.measure.cache.values(key, lambda: asdict(limit.within(ask))))
        return replace(measured, whole=False)
