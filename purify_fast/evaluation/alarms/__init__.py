"""The alarms, which search for signs that an attack failed for another reason than the model's robustness.

An alarm finds no sign ("passed"), finds a sign that is only noted, makes the robust accuracy unreliable, or was not
asked because nothing was measured (`STATES`).
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
