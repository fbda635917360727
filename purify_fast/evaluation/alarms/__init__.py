"""Can this number be believed? Signs that an attack was stopped by something else than robustness.

A sign passes, is noted or makes the number unreliable, or nothing was measured that could tell (`STATES`).

An alarm is a function from the `Evidence` to a `Finding`. To add one, write it in ``from_rows.py`` or, if the model has
to be asked, measure what it needs in ``probes.py`` and judge it in ``from_probes.py``; then name it in `ALARMS`.
"""

from dataclasses import replace

from .finding import STATES, Evidence, Finding, Verdict
from .from_probes import PROBE_ALARMS
from .from_rows import GUESSING, ROW_ALARMS
from .probes import Probes, probe

ALARMS = (*ROW_ALARMS, *PROBE_ALARMS)

#: The alarms about a model that gives no answer, or not always the same: its successes and failures are both doubtful.
INCONSISTENT = ("finite predictions", "batch size", "same answer again")

__all__ = [
    "ALARMS",
    "GUESSING",
    "INCONSISTENT",
    "STATES",
    "Evidence",
    "Finding",
    "Probes",
    "Verdict",
    "findings",
    "probe",
]


def findings(evidence: Evidence) -> list[Finding]:
    """What every alarm has to say, in order.

    A number of 0 cannot be too high, whatever stopped an attack: what would be a reason to doubt it is noted, unless
    the model's answers themselves are inconsistent.

    Args:
        evidence: rows and probes of one model.
    """
    every = [finding for alarm in ALARMS for finding in [alarm(evidence)] if finding is not None]
    inconsistent = any(finding.verdict == "unreliable" and finding.alarm in INCONSISTENT for finding in every)
    return every if inconsistent or evidence.left() != 0 else [_without_doubt(finding) for finding in every]


def _without_doubt(finding: Finding) -> Finding:
    """The finding about a number that is 0."""
    if finding.verdict != "unreliable":
        return finding
    return replace(finding, verdict="noted", measured=f"{finding.measured}; but no image is left that could fall")
