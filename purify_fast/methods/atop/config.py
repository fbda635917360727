"""The settings of AToP's training, with their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..._validation import AtLeast0, Count, DelayUnit, Precision, Range, ShareBelow1, check_types
from ...training.config import TrainingAttack, check_unused


@dataclass(frozen=True)
class AtopConfig:
    """The settings of the training of AToP's purifier; `purify_fast.methods.atop.recipes` has the authors' settings.

    "Official" is the official code of arXiv 2401.16352; "own" is this package's choice.

    Args:
        attack_method: "fgsm" (official: one step, no random start), "pgd", or "none", as in pre-training.
        attack_target: target of the attacks: "classifier" (official), or "pipeline", the whole defence with exact
            gradients (own).
        attack: the attack. Its norm, eps and eps_warmup set the ball (official: linf, eps 8/255). Its other settings
            are for PGD, and must have their defaults if attack_method is not "pgd".
        reconstruction_target: image that the purifier learns to rebuild. "adversarial": the adversarial image, from its
            transform (released notebooks; one pass). "clean": the clean image, from its transform (the authors' logged
            run). The cross-entropy then needs a second pass, over the adversarial image with the same noise and mask.
        cls_weight: weight lambda of the classifier's cross-entropy (official: 0.05; 0.1 on ImageNette).
        cls_delay: length of the first part of the training, in which the cross-entropy has weight 0 (official: 2
            epochs; the notebooks end an epoch after 625 steps of 8 images each).
        cls_delay_unit: unit of cls_delay: "epochs", "steps" or "images".
        classifier_range: range of the purified images in the cross-entropy. "unit": [0, 1], as in predictions.
            "doubled": [-1, 1], as in the released notebooks, although the classifier there was trained on [0, 1].
        reconstruction_weight: weight of the L1 terms (official: 1).
        gan_weight: weight of the purifier's GAN term, L_G (official: 1).
        discriminator_width: channels of the discriminator's first layer (official: 64).
        gan_grad: whether L_G trains the purifier, as in the paper's formula. The official code cuts off L_G's gradient,
            so the discriminator has no effect. With False, there is no discriminator.
        gan_fake: fake images in the discriminator's loss. "refined": the refined images (fine-tuning). "pasted": the
            refined images in the hidden blocks, and the transformed images elsewhere (pre-training).
        precision: "float32" (official), with full IEEE precision on a GPU too; "tf32" (own), which on a GPU rounds the
            factors of products to ten bits of mantissa during the training; or "bfloat16", which computes with a frozen
            copy of the classifier (own).
        schedule: schedule of the learning rate: "constant" (official) or "one_cycle" (own).
        learning_rate: learning rate of Adam (official: 1e-4).
        betas: betas of Adam (official: 0.5, 0.999).

    Raises:
        ValueError: a setting is out of range or would have no effect; the message names it.
    """

    attack_method: Literal["fgsm", "pgd", "none"] = "fgsm"
    attack_target: Literal["classifier", "pipeline"] = "classifier"
    attack: TrainingAttack = TrainingAttack(eps=8 / 255, steps=10)
    reconstruction_target: Literal["adversarial", "clean"] = "adversarial"
    cls_weight: AtLeast0 = 0.05
    cls_delay: Annotated[int, Range(0)] = 10_000
    cls_delay_unit: DelayUnit = "images"
    classifier_range: Literal["unit", "doubled"] = "unit"
    reconstruction_weight: AtLeast0 = 1.0
    gan_weight: AtLeast0 = 1.0
    discriminator_width: Count = 64
    gan_grad: bool = False
    gan_fake: Literal["refined", "pasted"] = "refined"
    precision: Precision = "float32"
    schedule: Literal["constant", "one_cycle"] = "constant"
    learning_rate: AtLeast0 = 1e-4
    betas: tuple[ShareBelow1, ShareBelow1] = (0.5, 0.999)

    def __post_init__(self) -> None:
        check_types(self)
        if not self.gan_grad:
            check_unused(self, type(self), ("gan_weight", "discriminator_width", "gan_fake"), "gan_grad=True")
        if self.attack_method != "pgd":
            of_pgd = ("steps", "alpha", "relative_alpha", "random_start", "start_std")
            check_unused(self.attack, type(self).attack, of_pgd, "attack_method='pgd'")
        if self.attack_method == "none":
            check_unused(self, type(self), ("attack_target",), "an attack_method")
        elif not self.attack.eps > 0:
            raise ValueError("eps must be above 0, got 0: to train without attacks, set attack_method='none'")

    @classmethod
    def pretraining(cls, **changes: Any) -> AtopConfig:
        """Return settings for the pre-training of a generator on clean images, with changed fields ``changes``.

        It has a hinge GAN loss and an L1 loss with weight 1, and no cross-entropy, as DeepFillv2's training in AToP's
        repository (`train see in Finetuning-AToP.py`, `configs/train.yaml`), but with the defence's transform.
        """
        settings = {"attack_method": "none", "reconstruction_target": "clean", "cls_weight": 0.0, "gan_grad": True}
        return cls(**{**settings, "gan_fake": "pasted", **changes})
