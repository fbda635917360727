"""The setting on digits: images, radius, the classifier that is defended and CARSO's sizes on it.

The demonstration and the studies of `benchmarks` train and attack in this setting alike.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .. import data
from ..attacks import PGD
from ..evaluation import AttackSpec, Report, evaluate
from ..evaluation.subject import Variant
from ..protocols import Classifier
from ..training import ClassifierConfig, TrainingAttack

EPS = 0.2
# a higher rate and more decay than the defaults: of a dozen settings the best under attack at 96 % clean
BASE_TRAINING = ClassifierConfig(
    attack=TrainingAttack(eps=EPS, steps=7, relative_alpha=2.0, eps_warmup=0.2), learning_rate=1e-2, weight_decay=2e-2
)
#: Epochs of that training; twice as many lose under attack.
BASE_EPOCHS = 120
#: What CARSO reads of `SmallCNN`, and the sizes of its parts.
LAYERS = ("conv2", "conv4", "hidden")
SIZES: dict[str, Any] = {"cond_dim": 64, "latent_dim": 8, "samples": 8, "decoder_width": 8}


@cache
def digits() -> data.DataSet:
    """The images: 1,297 to train on, 500 held out."""
    return data.load_dataset("digits")


def attacked(model: Classifier, images: int, attacks: list[AttackSpec], *, eps: float = EPS, **options: Any) -> Report:
    """Attack a model on the first so many held-out images, in batches that fit into a small memory.

    Args:
        model: images to logits.
        images: how many.
        attacks: what to run.
        eps: radius in image units.
        options: more arguments of `evaluate`.
    """
    x, y = digits().x_test[:images], digits().y_test[:images]
    sizes: dict[str, Any] = {"batch_size": 250, "max_forward_batch": 500}
    return evaluate(model, x, y, eps=eps, attacks=attacks, dataset_name=digits().name, **sizes, **options)


def ce_then_dlr(variant: Variant = "random") -> list[AttackSpec]:
    """PGD with cross-entropy, and with DLR on what that left."""
    return [AttackSpec(PGD(), variant), AttackSpec(PGD(loss="dlr"), variant, survivors_only=True)]
