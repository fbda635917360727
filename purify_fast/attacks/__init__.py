"""Attacks on any model that maps images in [0, 1] to logits.

A function, such as `pgd`, attacks one batch. A dataclass, such as `PGD`, has the same attack's options.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_exports
from .attacked_model import frozen as frozen
from .base import Attack as Attack, AttackContext as AttackContext, AttackResult as AttackResult
from .bpda import BpdaModel as BpdaModel
from .checkpointed_steps import checkpointed_steps as checkpointed_steps
from .functions import LeavingPGD as LeavingPGD, fgsm as fgsm, pgd as pgd
from .objective import GradientHealth as GradientHealth
from .pgd import FGSM as FGSM, PGD as PGD

# The searches that only a judge runs are imported when they are first used, so a training does not import them.
if TYPE_CHECKING:
    from ..judge.searches.apgd import APGD as APGD
    from ..judge.searches.engine import JudgeContext as JudgeContext
    from ..judge.searches.fab import FABT as FABT
    from ..judge.searches.model_tests import AttackersHead as AttackersHead
    from ..judge.searches.original_autoattack import OriginalAutoAttack as OriginalAutoAttack
    from ..judge.searches.square import Square as Square
    from ..judge.searches.stadv import StAdv as StAdv
else:
    _at_once = [name for name, value in globals().items() if callable(value) and name != "lazy_exports"]
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
    __all__ = sorted(__all__ + _at_once)
