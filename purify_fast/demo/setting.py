"""The setting on digits: images, radius, the classifier that is defended and CARSO's sizes on it.

The demonstration and the studies of `benchmarks` train and attack in this setting alike. The demonstration's budget and
workspace stand here too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from .. import data
from ..attacks import PGD
from ..evaluation import AttackSpec, EvaluateConfig, Report, evaluate
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
#: The layers of `SmallCNN` that CARSO reads, and the sizes of its parts.
LAYERS = ("conv2", "conv4", "hidden")
SIZES: dict[str, Any] = {"cond_dim": 64, "latent_dim": 8, "samples": 8, "decoder_width": 8}


@cache
def digits() -> data.DataSet:
    """The images: 1,297 to train on, 500 held out."""
    return data.load_dataset("digits")


def attacked(
    model: Classifier,
    images: int,
    attacks: list[AttackSpec],
    *,
    eps: float = EPS,
    config: EvaluateConfig = EvaluateConfig(),
    **options: Any,
) -> Report:
    """Attack a model on the first ``images`` held-out images, in batches that fit into a small memory.

    Args:
        model: images to logits.
        images: how many.
        attacks: the attacks to run.
        eps: radius in image units.
        config: the settings of the evaluation.
        options: more arguments of `evaluate`.
    """
    x, y = digits().x_test[:images], digits().y_test[:images]
    config = replace(config, max_forward_batch=500, dataset_name=digits().name)
    return evaluate(model, x, y, eps=eps, config=config, attacks=attacks, **options)


def ce_then_dlr(variant: Variant = "random") -> list[AttackSpec]:
    """PGD with cross-entropy, and PGD with DLR on the images that withstood it."""
    return [AttackSpec(PGD(), variant), AttackSpec(PGD(loss="dlr"), variant, survivors_only=True)]


@dataclass(frozen=True)
class Budget:
    """The amounts of everything, as chosen on digits.

    Args:
        images: held-out images that are attacked.
        standard_epochs: epochs of the standard classifier.
        base_epochs: epochs of the adversarially trained base.
        objective_epochs: epochs of CARSO with the paper's objective.
        pipeline_epochs: epochs of CARSO's fine-tuning through the pipeline.
        steps: steps of PGD on CARSO, ARREST and their bases.
        eot: draws of a random defence averaged per step.
        peel_steps: steps of PGD through the PeeL output.
        peel_images: images for the attack through the PeeL output, the first so many.
        autoattack_images: images for AutoAttack, the first so many.
        autoattack_steps: steps of AutoAttack's APGD and FAB.
        autoattack_queries: queries of AutoAttack's Square.
        generator_epochs: epochs of AToP's pre-training.
        atop_objective_epochs: epochs of AToP with the paper's objective.
        atop_cls_delay: the first of these epochs, which run without the cross-entropy.
        atop_pipeline_epochs: epochs of AToP's fine-tuning through the pipeline.
        atop_steps: steps of PGD on AToP.
        atop_images: images for the attacks on AToP, the first so many.
        arrest_epochs: epochs of ARREST, and of adversarial finetuning alone.
        arrest_carso_epochs: epochs of CARSO's training on ARREST's result.
    """

    images: int = 500
    standard_epochs: int = 20
    base_epochs: int = BASE_EPOCHS
    # CARSO
    objective_epochs: int = 30
    pipeline_epochs: int = 50
    steps: int = 50
    eot: int = 3
    peel_steps: int = 40
    peel_images: int = 100
    autoattack_images: int = 200
    autoattack_steps: int = 100
    autoattack_queries: int = 1000
    # AToP
    generator_epochs: int = 30
    atop_objective_epochs: int = 30
    atop_cls_delay: int = 2
    atop_pipeline_epochs: int = 20
    atop_steps: int = 40
    atop_images: int = 200
    # ARREST
    arrest_epochs: int = 40
    arrest_carso_epochs: int = 15


QUICK = Budget(
    images=60,
    standard_epochs=3,
    base_epochs=6,
    objective_epochs=3,
    pipeline_epochs=3,
    steps=8,
    eot=2,
    peel_steps=8,
    peel_images=30,
    autoattack_images=8,
    autoattack_steps=4,
    autoattack_queries=20,
    generator_epochs=2,
    atop_objective_epochs=2,
    atop_cls_delay=1,
    atop_pipeline_epochs=1,
    atop_steps=4,
    atop_images=20,
    arrest_epochs=2,
    arrest_carso_epochs=1,
)


@dataclass(frozen=True)
class Workspace:
    """The folder of a demonstration's files, the amounts, and whether progress is shown.

    Args:
        out: the folder for the files.
        budget: how much is trained and attacked.
        seed: seed of all random draws.
        progress: whether bars are shown.
    """

    out: Path
    budget: Budget
    seed: int
    progress: bool = True
