"""Can this number be believed? Signs that an attack was stopped by something else than robustness.

An alarm is a function from the `Evidence` to a `Finding`. To add one, write it in ``from_rows.py`` or, if the model has
to be asked, measure what it needs in ``probes.py`` and judge it in ``from_probes.py``; then name it in `ALARMS`.
"""

from .finding import Evidence, Finding, Verdict
from .from_probes import PROBE_ALARMS
from .from_rows import GUESSING, ROW_ALARMS
from .probes import Probes, probe

ALARMS = (*ROW_ALARMS, *PROBE_ALARMS)

#: The alarms about a model that gives no answer, or not always the same: its successes and failures are both doubtful.
INCONSISTENT = ("finite predictions", "batch size", "noise and seeds", "same answer again")

__all__ = ["ALARMS", "GUESSING", "INCONSISTENT", "Evidence", "Finding", "Probes", "Verdict", "findings", "probe"]


def findings(evidence: Evidence) -> list[Finding]:
    """What every alarm has to say, in order.

    Args:
        evidence: rows and probes of one model.
    """
    return [finding for alarm in ALARMS for finding in [alarm(evidence)] if finding is not None]
