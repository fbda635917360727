"""The settings of AToP's training, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..._validation import AtLeast0, Count, Precision, Range, ShareBelow1, check_types
from ...training.config import TrainingAttack
from ...training.schedules import DelayUnit


@dataclass(frozen=True)
class AtopConfig:
    """The settings of the training of AToP's purifier; `purify_fast.methods.atop.recipes` has the authors' settings.

    "Official" is the official code of arXiv 2401.16352, "own" a choice of this package.

    Args:
        attack_method: "fgsm" (official: one step, no random start), "pgd", or "none" as in pre-training.
        attack_target: the target of the attacks: "classifier" (official), or "pipeline", the whole defence with exact
            gradients (own).
        attack: the ball (official: linf, eps 8/255); its other settings are PGD's, and must stay as they are without
            it.
        reconstruction_target: "adversarial", the purifier rebuilds what it gets (released notebooks, one pass), or
            "clean", a clean image from its own transform, in a second pass with the same noise and mask (the logged
            run).
        cls_weight: weight of the classifier's cross-entropy, lambda (official: 0.05; 0.1 on ImageNette).
        cls_delay: how much of the training is over before the cross-entropy acts (official: 2 epochs, each of which the
            notebooks cut off after 625 steps of 8 images).
        cls_delay_unit: unit of cls_delay: "epochs", "steps" or "images".
        classifier_range: range of the purified image that the cross-entropy hands to the classifier: "unit", values in
            [0, 1] as everywhere else, or "doubled", values in [-1, 1], which the released notebooks hand to a
            classifier that was trained on [0, 1].
        reconstruction_weight: weight of the L1 terms, or of the purifier's own ``original_loss`` (official: 1).
        gan_weight: weight of the purifier's GAN term, L_G (official: 1).
        discriminator_width: channels of the discriminator's first layer (official: 64).
        gan_grad: whether L_G trains the purifier, as the paper's formula says. In the official code its gradient is cut
            off, so that the discriminator changes nothing: False leaves it out.
        gan_fake: the fake images for the discriminator's own step: "refined", the refined image (fine-tuning), or
            "pasted", the refined image in the hole and the transformed image elsewhere (pre-training).
        masks: the pixels that are hidden from the purifier while it is trained: "blocks", as the defence hides them, or
            "free_form", a box and brush strokes and no noise, as in DeepFillv2's own training, see
            `purify_fast.methods.atop.deepfill_training`; "free_form" needs a training without attacks.
        precision: "float32" (official), which on a GPU is that of IEEE too; "tf32" (own), which there rounds what is
            multiplied to ten bits of mantissa, while `purify_fast.training.fit` trains; or
            "bfloat16" to train the accelerated defence (own).
        schedule: schedule of the learning rate: "constant" (official) or "one_cycle" (own).
        learning_rate: learning rate of Adam (official: 1e-4).
        betas: betas of Adam (official: 0.5, 0.999).

    Raises:
        ValueError: a setting out of range, or one that would have no effect; the message names it.
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
    masks: Literal["blocks", "free_form"] = "blocks"
    precision: Precision = "float32"
    schedule: Literal["constant", "one_cycle"] = "constant"
    learning_rate: AtLeast0 = 1e-4
    betas: tuple[ShareBelow1, ShareBelow1] = (0.5, 0.999)

    def __post_init__(self) -> None:
        check_types(self)
        gan = ("gan_weight", "discriminator_width", "gan_fake")
        if not self.gan_grad and (odd := [name for name in gan if getattr(self, name) != getattr(type(self), name)]):
            raise ValueError(
                f"{odd[0]} needs gan_grad=True, which has a discriminator, got {odd[0]}={getattr(self, odd[0])!r}"
            )

        attack, default = self.attack, type(self).attack
        if self.attack_method != "none" and not attack.eps > 0:
            raise ValueError(f"eps must be above 0, got {attack.eps}; attack_method='none' trains without attacks")
        if self.masks == "free_form" and (self.attack_method != "none" or self.cls_weight > 0):
            raise ValueError(
                "masks='free_form' is for pre-training and needs attack_method='none' and cls_weight=0, got "
                f"{self.attack_method!r} and {self.cls_weight}"
            )
        if self.attack_method == "none" and self.attack_target == "pipeline":
            raise ValueError("attack_target='pipeline' needs an attack: give attack_method 'fgsm' or 'pgd'")
        for name in ("steps", "alpha", "relative_alpha", "random_start", "start_std"):
            if self.attack_method != "pgd" and getattr(attack, name) != getattr(default, name):
                raise ValueError(f"{name} needs attack_method='pgd', got {name}={getattr(attack, name)}")

    @classmethod
    def pretraining(cls, **changes: Any) -> AtopConfig:
        """Generator pre-training: hinge GAN and L1 on clean images, no classifier, both with weight 1.

        Losses and weights are those of DeepFillv2's training as AToP's repository has it (code: `train see in
        Finetuning-AToP.py`, `configs/train.yaml`). The images are transformed as the defence transforms them; with
        ``masks="free_form"`` a box and brush strokes are hidden and no noise is added, as there.

        Args:
            changes: fields to set otherwise.
        """
        settings = {"attack_method": "none", "reconstruction_target": "clean", "cls_weight": 0.0, "gan_grad": True}
        return cls(**{**settings, "gan_fake": "pasted", **changes})
