"""Honest evaluation of any model from images in [0, 1] to logits: attacks, gradient health, tables and pictures."""

from .report import Report, merge
from .rows import Examples, Paired, Row
from .runner import evaluate
from .show.tradeoff import Tradeoff, ar_bd, ar_point_dist, plot_tradeoff
from .specs import AttackSpec, as_attack, lee_kim_2023
from .witnesses import CheckedWitnesses, check_witnesses

__all__ = [
    "AttackSpec",
    "CheckedWitnesses",
    "Examples",
    "Paired",
    "Report",
    "Row",
    "Tradeoff",
    "ar_bd",
    "ar_point_dist",
    "as_attack",
    "check_witnesses",
    "evaluate",
    "lee_kim_2023",
    "merge",
    "plot_tradeoff",
]
