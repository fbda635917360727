"""The end of an evaluation: whether its numbers can be believed, and what it would take to go lower."""

from __future__ import annotations

import dataclasses
from typing import Any

from .alarms import Evidence, Probes, findings, probe
from .alarms.probes import PROBED, Before, curves
from .measure import Measure
from .outlook import outlook
from .report import Report


def conclude(report: Report, measure: Measure, before: Before | None) -> None:
    """Add to a report what the alarms found, the curves of the probes and the outlook; mark what is not believed.

    Args:
        report: of one model, with all of its rows.
        measure: what made them.
        before: the answers of the model before the attacks, to ask it again; None: it is asked nothing more.
    """
    rows = [row for row in report.rows if row.kind != "worst"]
    evidence = Evidence(rows, None if before is None else _probed(measure, before, [row.attack for row in rows]))
    report.findings = [dataclasses.replace(finding, model=measure.name) for finding in findings(evidence)]
    if evidence.probes is not None:
        report.curves[measure.name] = {
            name: [list(point) for point in curve] for name, curve in curves(evidence.probes).items()
        }
    expected = outlook(evidence)
    if expected is not None:
        report.outlooks = [dataclasses.replace(expected, model=measure.name)]
    doubts = [finding.alarm for finding in report.findings if finding.verdict == "unreliable"]
    for row in report.rows:
        if row.kind == "worst" and row.threat is None and doubts and row.settings["attacked"]:
            row.reliable = False
            row.settings["doubts"] = doubts


def _probed(measure: Measure, before: Before, attacks: list[str]) -> Probes:
    """The probes; kept ones are used again only after the same attacks, which some of them compare answers with."""
    context, subject = measure.context, measure.subject

    def make() -> dict[str, Any]:
        return probe(before, context).to_dict()

    if measure.cache is None:
        return Probes(**make())
    what = {
        "probes": 1, "data": subject.data, "images": PROBED, "eps": context.eps, "norm": context.norm,
        "seed": subject.seed, "eot_iter": context.eot_iter, "variant": subject.is_random, "attacks": attacks,
        "batch_size": context.batch_size, "max_forward_batch": context.max_forward_batch,
    }  # fmt: skip
    return Probes(**measure.cache.value(measure.cache.key(what, subject.model), make))
