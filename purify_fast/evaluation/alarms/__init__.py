"""Signs that an attack was stopped by something else than robustness, so that its number cannot be believed.

A sign passes, is noted, makes the number unreliable, or was not asked because nothing was measured (`STATES`).
"""

from .evidence import STATES, Evidence, Finding, Outlook, Verdict, outlook
from .masking import signs_of_masking
from .probes import Probes, probe
from .signs import findings

__all__ = [
    "STATES",
    "Evidence",
    "Finding",
    "Outlook",
    "Probes",
    "Verdict",
    "findings",
    "outlook",
    "probe",
    "signs_of_masking",
]
