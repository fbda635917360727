"""How the demonstration says a number, and a difference between two models."""

from __future__ import annotations

from ..evaluation import Report


def percent(report: Report, attack: str) -> str:
    """A row's accuracy, as the sentences say it."""
    row = report.row(attack)
    return f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f} %"


def against(report: Report, other: Report, attack: str, what: str) -> str:
    """The paired difference between two models under one attack, and what it is worth."""
    paired = report.paired(other, attack)
    difference, error = paired.difference, 2 * paired.standard_error
    if abs(difference) <= error:
        return f"{paired}, no significant difference from {what} (within two standard errors)"
    return f"{paired}, {'better' if difference > 0 else 'worse'} than {what} (by more than two standard errors)"
