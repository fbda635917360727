"""Attacks on any model that maps images in [0, 1] to logits; run on a frozen view of it."""

from ._frozen import frozen
from .gradient import fgsm, input_gradient, pgd, pgd_and_fgsm
from .health import GradientHealth
from .losses import LOSSES, cross_entropy, dlr, margin

__all__ = [
    "LOSSES",
    "GradientHealth",
    "cross_entropy",
    "dlr",
    "fgsm",
    "frozen",
    "input_gradient",
    "margin",
    "pgd",
    "pgd_and_fgsm",
]
