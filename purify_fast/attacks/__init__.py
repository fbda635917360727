"""Attacks on any model that maps images in [0, 1] to logits; run on a frozen view of it."""

from .apgd import apgd
from .bpda import Bpda
from .frozen_model import frozen
from .gradient import fgsm, input_gradient, pgd, pgd_and_fgsm
from .health import GradientHealth
from .losses import LOSSES, TARGETED, cross_entropy, dlr, dlr_targeted, margin
from .stadv import stadv

__all__ = [
    "LOSSES",
    "TARGETED",
    "Bpda",
    "GradientHealth",
    "apgd",
    "cross_entropy",
    "dlr",
    "dlr_targeted",
    "fgsm",
    "frozen",
    "input_gradient",
    "margin",
    "pgd",
    "pgd_and_fgsm",
    "stadv",
]
