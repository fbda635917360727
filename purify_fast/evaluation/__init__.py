"""Honest evaluation of any model from images in [0, 1] to logits: attacks, gradient health, tables and pictures."""

from .metrics import Tradeoff, ar_bd, ar_point_dist
from .report import Examples, Paired, Report, Row, merge
from .runner import evaluate
from .show.plots import plot_tradeoff
from .specs import AttackSpec, as_attack, lee_kim_2023

__all__ = [
    "AttackSpec",
    "Examples",
    "Paired",
    "Report",
    "Row",
    "Tradeoff",
    "ar_bd",
    "ar_point_dist",
    "as_attack",
    "evaluate",
    "lee_kim_2023",
    "merge",
    "plot_tradeoff",
]
