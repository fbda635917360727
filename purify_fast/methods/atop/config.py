"""The settings of AToP's training, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..._compat import old_settings
from ..._validation import check_literal
from ...training.attack import TrainingAttack

AttackMethod = Literal["fgsm", "pgd", "none"]
AttackTarget = Literal["classifier", "pipeline"]
ReconstructionTarget = Literal["adversarial", "clean"]
GanFake = Literal["refined", "pasted"]
Precision = Literal["float32", "tf32", "bfloat16"]
Schedule = Literal["constant", "one_cycle"]

#: What the official notebooks change of `AtopConfig`'s defaults. They name the transform, which is the defence's.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar_rt1": {"cls_delay_epochs": 0},
    "cifar_rt2": {},
    "imagenette_rt1": {"cls_delay_epochs": 0},
    "imagenette_rt2": {"cls_weight": 0.1},
    # the notebook whose output is kept: CIFAR-10, rt2
    "logged": {"reconstruction_target": "clean"},
    # the paper's formula, which no notebook computes
    "formula": {"gan_grad": True},
}


@old_settings("atop")
@dataclass(frozen=True)
class AtopConfig:
    """How AToP's purifier is trained; the defaults are the released CIFAR-10 notebooks'.

    "Official" is the official code of arXiv 2401.16352, "own" a choice of this package.

    Args:
        attack_method: "fgsm" (official: one step, no random start), "pgd", or "none" as in pre-training.
        attack_target: what is attacked: "classifier" (official), or "pipeline", the whole defence with exact gradients
            (own).
        attack: the ball (official: linf, eps 8/255); its other settings are PGD's, and must stay as they are without
            it.
        reconstruction_target: "adversarial", the purifier rebuilds what it gets (released notebooks, one pass), or
            "clean", a clean image from its own transform, in a second pass with the same noise and mask (the logged
            run).
        cls_weight: weight of the classifier's cross-entropy, lambda (official: 0.05; 0.1 on ImageNette).
        cls_delay_epochs: first epochs without the cross-entropy (official: 2).
        reconstruction_weight: weight of the L1 terms, or of the purifier's own ``original_loss`` (official: 1).
        gan_weight: weight of the purifier's GAN term, L_G (official: 1).
        discriminator_width: channels of the discriminator's first layer (official: 64).
        gan_grad: whether L_G trains the purifier, as the paper's formula says. In the official code its gradient is cut
            off, so that the discriminator changes nothing: False does without it.
        gan_fake: what the discriminator sees as fake in its own step: "refined", the refined image (fine-tuning), or
            "pasted", the refined image in the hole and the transformed one elsewhere (pre-training).
        precision: "float32" (official), which on a GPU is that of IEEE too; "tf32" (own), which there rounds what is
            multiplied to ten bits of mantissa, while `purify_fast.training.fit` trains; or
            "bfloat16" to train the accelerated defence (own).
        schedule: of the learning rate: "constant" (official) or "one_cycle" (own).
        learning_rate: of Adam (official: 1e-4).
        betas: of Adam (official: 0.5, 0.999).

    Raises:
        ValueError: a setting out of range, or one that would have no effect; the message names it.
    """

    attack_method: AttackMethod = "fgsm"
    attack_target: AttackTarget = "classifier"
    attack: TrainingAttack = TrainingAttack(eps=8 / 255, steps=10)
    reconstruction_target: ReconstructionTarget = "adversarial"
    cls_weight: float = 0.05
    cls_delay_epochs: int = 2
    reconstruction_weight: float = 1.0
    gan_weight: float = 1.0
    discriminator_width: int = 64
    gan_grad: bool = False
    gan_fake: GanFake = "refined"
    precision: Precision = "float32"
    schedule: Schedule = "constant"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)

    def __post_init__(self) -> None:
        check_literal("attack_method", self.attack_method, AttackMethod)
        check_literal("attack_target", self.attack_target, AttackTarget)
        check_literal("reconstruction_target", self.reconstruction_target, ReconstructionTarget)
        check_literal("gan_fake", self.gan_fake, GanFake)
        check_literal("precision", self.precision, Precision)
        check_literal("schedule", self.schedule, Schedule)
        self._check_attack()
        names = ("cls_weight", "reconstruction_weight", "gan_weight", "learning_rate", "cls_delay_epochs")
        for name in names:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.discriminator_width < 1:
            raise ValueError(f"discriminator_width must be at least 1, got {self.discriminator_width}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        gan = ("gan_weight", "discriminator_width", "gan_fake")
        if not self.gan_grad and (odd := [name for name in gan if getattr(self, name) != getattr(type(self), name)]):
            raise ValueError(
                f"{odd[0]} {getattr(self, odd[0])!r} goes with gan_grad: without it there is no discriminator"
            )

    def _check_attack(self) -> None:
        attack, default = self.attack, type(self).attack
        if self.attack_method != "none" and not attack.eps > 0:
            raise ValueError(f"eps must be above 0, got {attack.eps}; attack_method='none' trains without attacks")
        if self.attack_method == "none" and self.attack_target == "pipeline":
            raise ValueError("attack_target 'pipeline' needs an attack: fgsm or pgd")
        if self.attack_method == "pgd":
            return
        if (attack.steps, attack.alpha) != (default.steps, default.alpha):
            raise ValueError(f"steps and alpha go with attack_method='pgd', got {attack.steps} and {attack.alpha}")
        for name in ("relative_alpha", "random_start"):
            if getattr(attack, name) != getattr(default, name):
                raise ValueError(f"{name} goes with attack_method='pgd', got {getattr(attack, name)}")

    @classmethod
    def published(cls, name: str = "cifar_rt2", **changes: Any) -> AtopConfig:
        """The numbers of one of the official notebooks.

        Args:
            name: the notebook, one of `PUBLISHED`.
            changes: fields to set otherwise.

        Raises:
            ValueError: another name.
        """
        if name not in PUBLISHED:
            raise ValueError(f"name must be one of {', '.join(PUBLISHED)}, got {name!r}")
        return cls(**{**PUBLISHED[name], **changes})

    @classmethod
    def pretraining(cls, **changes: Any) -> AtopConfig:
        """Generator pre-training: hinge GAN and L1 on clean images, no classifier (DeepFillv2's, w_adv = w_l1 = 1).

        Args:
            changes: fields to set otherwise.
        """
        made = {"attack_method": "none", "reconstruction_target": "clean", "cls_weight": 0.0, "gan_grad": True}
        return cls(**{**made, "gan_fake": "pasted", **changes})
