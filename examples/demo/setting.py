"""The settings that the demonstration shares with the studies on digits: images, radius, base, and CARSO's sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from purify_fast import data
from purify_fast.attacks import PGD
from purify_fast.evaluation import AttackSpec, EvaluateConfig, Report, evaluate
from purify_fast.protocols import Classifier
from purify_fast.training import ClassifierConfig, TrainingAttack

EPS = 0.2
# Learning rate and weight decay are above the defaults. Among a dozen settings, these had the best accuracy under
# attack at a clean accuracy of 96 %.
BASE_TRAINING = ClassifierConfig(
    attack=TrainingAttack(eps=EPS, steps=7, relative_alpha=2.0, eps_warmup=0.2), learning_rate=1e-2, weight_decay=2e-2
)
#: Epochs of `BASE_TRAINING`. With twice as many, the accuracy under attack was lower.
BASE_EPOCHS = 120
#: The layers of `SmallCNN` that are CARSO's representation, and the sizes of CARSO's parts.
LAYERS = ("conv2", "conv4", "hidden")
SIZES: dict[str, Any] = {"cond_dim": 64, "latent_dim": 8, "samples": 8, "decoder_width": 8}


@cache
def digits() -> data.DataSet:
    """Load the digits: 1,297 training images and 500 held-out images."""
    return data.load_dataset("digits")


def attacked(
    model: Classifier,
    images: int,
    attacks: list[AttackSpec],
    *,
    eps: float = EPS,
    **options: Any,
) -> Report:
    """Attack a model on the first ``images`` held-out images, in batches that fit into a small memory.

    Args:
        model: function or module from images to logits.
        images: number of images.
        attacks: attacks to run.
        eps: radius in image units.
        options: more arguments of `evaluate`.
    """
    x, y = digits().x_test[:images], digits().y_test[:images]
    config = EvaluateConfig(max_forward_batch=500, dataset_name=digits().name)
    return evaluate(model, x, y, eps=eps, attacks=attacks, config=config, **options)


def ce_then_dlr() -> list[AttackSpec]:
    """PGD with cross-entropy, and then PGD with DLR on the images that are still classified correctly."""
    return [AttackSpec(PGD()), AttackSpec(PGD(loss="dlr"), survivors_only=True)]


@dataclass(frozen=True)
class Budget:
    """The numbers of epochs, steps and images in the demonstration, which were chosen on digits.

    Args:
        images: number of held-out images that are attacked.
        standard_epochs: epochs of the standard classifier.
        base_epochs: epochs of the adversarially trained base.
        objective_epochs: epochs of CARSO with the paper's objective.
        pipeline_epochs: epochs of CARSO's fine-tuning through the pipeline.
        steps: steps of PGD on CARSO, ARREST and their bases.
        eot: number of draws of a random defence over which a step averages the gradient.
        peel_steps: steps of PGD through the PeeL output.
        peel_images: number of images for the attack through the PeeL output.
        autoattack_images: number of images for AutoAttack.
        autoattack_steps: steps of AutoAttack's APGD and FAB.
        autoattack_queries: queries of AutoAttack's Square.
        generator_epochs: epochs of AToP's pre-training.
        atop_objective_epochs: epochs of AToP with the paper's objective.
        atop_cls_delay: number of the first epochs of AToP with the paper's objective, in which the loss has no
            cross-entropy.
        atop_pipeline_epochs: epochs of AToP's fine-tuning through the pipeline.
        atop_steps: steps of PGD on AToP.
        atop_images: number of images for the attacks on AToP.
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


@dataclass(frozen=True)
class Workspace:
    """The folder and the settings of a run of the demonstration.

    Args:
        out: folder of all files.
        budget: numbers of epochs, steps and images.
        seed: seed of all random draws.
        progress: whether to show progress bars.
    """

    out: Path
    budget: Budget
    seed: int
    progress: bool = True
