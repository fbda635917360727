"""Can this number be believed? Signs that an attack was stopped by something else than robustness.

A sign passes, is noted or makes the number unreliable, or nothing was measured that could tell (`STATES`).
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
