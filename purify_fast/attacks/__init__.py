"""Attacks on any model that maps images in [0, 1] to logits.

The functions, such as `pgd`, attack a batch; the dataclasses, such as `PGD`, are rows of `purify_fast.evaluation`.
"""

from .apgd import APGD, apgd
from .attackbench import for_attackbench
from .attacked_model import frozen
from .base import Attack, AttackContext, AttackResult
from .bpda import BPDA, BpdaModel
from .branch_and_bound import BranchAndBound, branch_and_bound
from .carlini_wagner import CarliniWagner, carlini_wagner
from .checkpointed_steps import checkpointed_steps
from .deepfool import DeepFool, deepfool
from .fab import FABT, fab_t
from .heads import AttackersHead
from .hop_skip_jump import HopSkipJump, hop_skip_jump
from .original_autoattack import AutoAttack
from .pgd import FGSM, PGD, LeavingPGD, fgsm, pgd
from .search import GradientHealth
from .square import Square, square
from .stadv import StAdv, stadv

__all__ = [
    "APGD",
    "BPDA",
    "FABT",
    "FGSM",
    "PGD",
    "Attack",
    "AttackContext",
    "AttackResult",
    "AttackersHead",
    "AutoAttack",
    "BpdaModel",
    "BranchAndBound",
    "CarliniWagner",
    "DeepFool",
    "GradientHealth",
    "HopSkipJump",
    "LeavingPGD",
    "Square",
    "StAdv",
    "apgd",
    "branch_and_bound",
    "carlini_wagner",
    "checkpointed_steps",
    "deepfool",
    "fab_t",
    "fgsm",
    "for_attackbench",
    "frozen",
    "hop_skip_jump",
    "pgd",
    "square",
    "stadv",
]
