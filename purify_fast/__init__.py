"""Evaluate, train and speed up adversarial defences of image classifiers in PyTorch.

- `purify_fast.frozen_copy`, `images_only`: a faster copy of any module, for predictions and attacks on the images.
- `purify_fast.Carso`, `Atop`, `DiffusionPurifier`: defences, which are modules from images in [0, 1] to logits.
- `purify_fast.load_defence`, `load_classifier`: functions that read a saved model.
- `purify_fast.methods.carso`, `.atop`, `.arrest`, `.diffusion`: each method's networks, settings and training.
- `purify_fast.training`: the training loop of all methods. `purify_fast.data`: data sets.
- `purify_fast.evaluation`: adaptive evaluation and reports. `purify_fast.attacks`: the attacks.
- `purify_fast.autoattack`: a class with the names of the original AutoAttack, which runs this package's attacks.
- `purify_fast.ops`: the fused operations. `purify_fast.nn`: the same as modules.
- `purify_fast.speed`: faster copies of frozen models, and CUDA graphs.
- `purify_fast.zoo`: small trained models. `purify_fast.models`: classifiers.
- `purify_fast.defences`: base classes of defences. `purify_fast.protocols`: optional methods of your own model.

Each name is imported when it is first used, so ``purify-fast --help`` does not wait for the import of PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy_exports
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import (
        attacks as attacks,
        autoattack as autoattack,
        data as data,
        defences as defences,
        evaluation as evaluation,
        methods as methods,
        models as models,
        nn as nn,
        ops as ops,
        protocols as protocols,
        speed as speed,
        training as training,
        zoo as zoo,
    )
    from .data import load_dataset as load_dataset
    from .evaluation import EvaluateConfig as EvaluateConfig, certify as certify, evaluate as evaluate
    from .methods import arrest as arrest, atop as atop, carso as carso, diffusion as diffusion
    from .methods.atop import Atop as Atop
    from .methods.carso import Carso as Carso
    from .methods.diffusion import DiffusionPurifier as DiffusionPurifier
    from .methods.loading import load_defence as load_defence
    from .speed.frozen_copy import frozen_copy as frozen_copy, images_only as images_only
    from .training import fit as fit, load_classifier as load_classifier, save_classifier as save_classifier
else:
    # A type checker must not see `__getattr__`, which would accept every name.
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
