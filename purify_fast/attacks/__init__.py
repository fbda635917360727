"""Attacks on any model that maps images in [0, 1] to logits.

A function, such as `pgd`, attacks one batch. A dataclass, such as `PGD`, has the same attack's options.
"""

import types

from .apgd import APGD as APGD
from .apgd import apgd as apgd
from .attacked_model import frozen as frozen
from .base import Attack as Attack
from .base import AttackResult as AttackResult
from .bpda import BpdaModel as BpdaModel
from .checkpointed_steps import checkpointed_steps as checkpointed_steps
from .context import AttackContext as AttackContext
from .fab import FABT as FABT
from .fab import fab_t as fab_t
from .heads import AttackersHead as AttackersHead
from .original_autoattack import OriginalAutoAttack as OriginalAutoAttack
from .pgd import FGSM as FGSM
from .pgd import PGD as PGD
from .pgd import LeavingPGD as LeavingPGD
from .pgd import fgsm as fgsm
from .pgd import pgd as pgd
from .search import GradientHealth as GradientHealth
from .square import Square as Square
from .square import square as square
from .stadv import StAdv as StAdv
from .stadv import stadv as stadv

__all__ = sorted(
    name for name, value in globals().items() if name[0] != "_" and not isinstance(value, types.ModuleType)
)
