"""Fast, honest adversarial purification for PyTorch.

defence = purify_fast.Carso(classifier, layers, image_shape)      logits = defence(x), x in [0, 1]
purify_fast.ops          fused operations        purify_fast.attacks      FGSM, PGD with EOT
purify_fast.training     the shared loop         purify_fast.evaluation   adaptive evaluation and reports
"""

from . import attacks, evaluation, ops, training
from .carso import Carso, load

__version__ = "0.1.0"
__all__ = ["Carso", "attacks", "evaluation", "load", "ops", "training"]
