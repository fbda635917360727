"""The end of an evaluation: whether its numbers can be believed, and what it would take to go lower."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from .._tensors import digest
from .alarms import Evidence, Probes, findings, outlook, probe
from .alarms.answers import PROBED, Before
from .alarms.probes import cost
from .measure import Measure
from .report import Report


def conclude(report: Report, measure: Measure, before: Before | None) -> None:
    """Add to a report the findings of the alarms, the curves of the probes and the outlook; mark what is not believed.

    Args:
        report: of one model, with all of its rows.
        measure: what made them.
        before: the answers of the model before the attacks, to ask it again; None: it is asked nothing more.
    """
    rows = [row for row in report.rows if row.kind == "clean" or row.is_attack]
    subject = measure.subject
    evidence = Evidence(rows, classes=subject.num_classes, probabilities=subject.has_probabilities)
    if before is not None:
        evidence = replace(evidence, probes=_probes(measure, before, evidence))
    report.findings = [replace(finding, model=measure.name) for finding in findings(evidence)]
    if evidence.probes is not None:
        report.curves[measure.name] = evidence.probes.curves()
    expected = outlook(evidence)
    if expected is not None:
        report.outlooks = [replace(expected, model=measure.name)]
    doubts = [finding for finding in report.findings if finding.verdict == "unreliable"]
    inconsistent = any(finding.of_answers for finding in doubts)
    for row in report.rows:
        # what has fallen has fallen: where nothing is left, no attack was stopped by anything
        headline = row.kind == "worst" and row.threat is None and row.deployed
        if headline and doubts and (row.accuracy > 0 or inconsistent):
            row.reliable = False
            row.settings["doubts"] = [finding.alarm for finding in doubts]


def _probes(measure: Measure, before: Before, evidence: Evidence) -> Probes:
    """The probes; kept ones are used again only after the same attacks, which some of them compare answers with."""
    context, subject = measure.context, measure.subject
    # which of the first images withstood every attack on the model as it is; none without an attack
    n = min(PROBED, max(row.n for row in evidence.rows))
    masks = [torch.from_numpy(row.robust[:n]) for row in evidence.attacks() if row.n >= n]
    left = torch.stack(masks).all(0) if masks else torch.zeros(n, dtype=torch.bool)

    def make() -> dict[str, Any]:
        with measure.progress.row("probes", cost(subject, context)):
            return asdict(probe(before, context, left, measure.progress))

    if measure.cache is None:
        return Probes(**make())
    settings = {
        "probes": 2, "data": subject.data, "images": PROBED, "eps": context.eps, "norm": context.norm,
        "seed": subject.seed, "eot_iter": context.eot_iter, "variant": subject.is_random,
        "attacks": [row.attack for row in evidence.rows], "left": digest(left), "revision": measure.revision,
        "batch_size": context.batch_size, "max_forward_batch": context.max_forward_batch,
    }  # fmt: skip
    return Probes(**measure.cache.values(measure.cache.key(settings, subject.model), make))
