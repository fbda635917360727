"""Attacks on any model that maps images in [0, 1] to logits.

The functions, such as `pgd`, attack a batch; the dataclasses, such as `PGD`, are rows of `purify_fast.evaluation`.
"""

from .apgd import APGD, apgd
from .attacked_model import frozen
from .autoattack import AutoAttack
from .ball import Ball, sample_in_ball
from .base import Attack, AttackContext, Run, ThreatModel
from .bpda import BPDA, BpdaModel
from .fab import FABT, fab_t
from .heads import HEADS, AttackersHead
from .losses import (
    LOSSES,
    TARGETED,
    cross_entropy,
    dlr,
    dlr_targeted,
    margin,
    margin_targeted,
    scaled_margin,
)
from .objective import input_gradient
from .pgd import FGSM, PGD, fgsm, pgd, pgd_and_fgsm
from .search import GradientHealth
from .square import Square, square
from .stadv import StAdv, stadv

__all__ = [
    "APGD",
    "BPDA",
    "FABT",
    "FGSM",
    "HEADS",
    "LOSSES",
    "PGD",
    "TARGETED",
    "Attack",
    "AttackContext",
    "AttackersHead",
    "AutoAttack",
    "Ball",
    "BpdaModel",
    "GradientHealth",
    "Run",
    "Square",
    "StAdv",
    "ThreatModel",
    "apgd",
    "cross_entropy",
    "dlr",
    "dlr_targeted",
    "fab_t",
    "fgsm",
    "frozen",
    "input_gradient",
    "margin",
    "margin_targeted",
    "pgd",
    "pgd_and_fgsm",
    "sample_in_ball",
    "scaled_margin",
    "square",
    "stadv",
]
