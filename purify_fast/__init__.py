"""Fast, honest adversarial purification for PyTorch.

defence = purify_fast.Carso(classifier, layers, image_shape)      logits = defence(x), x in [0, 1]
defence = purify_fast.Atop(classifier, purifier, image_shape)     the same interface
purify_fast.ops          fused operations        purify_fast.attacks      PGD, APGD, BPDA, StAdv; EOT
purify_fast.training     the shared loop         purify_fast.evaluation   adaptive evaluation and reports
"""

__version__ = "0.1.0"  # first: what is imported below reads it

from . import _compat, attacks, evaluation, ops, training
from .methods.atop import Atop
from .methods.carso import Carso
from .methods.saving import load

_compat.install()

__all__ = ["Atop", "Carso", "attacks", "evaluation", "load", "ops", "training"]
