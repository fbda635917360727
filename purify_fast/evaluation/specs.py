"""What is run: one attack for each row of a report, and a published attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from .._validation import check_literal
from ..attacks import BPDA, PGD, Attack
from ..attacks.arguments import check_at_least_one, check_eps, check_not_negative
from ..attacks.bpda import check_aggregation
from ..protocols import Classifier
from .function_attack import AttackFunction, as_attack
from .subject import Variant

#: The target that stands for the defence's own classifier.
CLASSIFIER = "classifier"
LEE_KIM = "PGD-200 ce + EOT (Lee & Kim 2023)"


@dataclass(frozen=True)
class AttackSpec:
    """An attack, and how it is used for a row: on what, on which images, under which name.

    Args:
        attack: one of `purify_fast.attacks`, or a function ``(model, x, y) -> x_adv`` (see `as_attack`).
        variant: which mode of the model is attacked and judged: ``random``, as it is; ``fixed``, every image under the
            same noise; ``deterministic``, without noise.
        target: attack this model instead, and judge the defence by the result: a transfer attack, or another view of
            the defence. ``"classifier"``: the defence's own classifier, alone; the row's name says how little that
            shows.
        aggregation: attack the defence with its samples aggregated so, by a method of `purify_fast.ops.aggregate`, and
            judge the defence as it is. BPDA has an option of its own for this.
        label: the row's name; made from the rest if None. Another threat model than the report's, or the target
            ``"classifier"``, is named after it.
        max_images: attack only the first so many images; None: all.
        survivors_only: attack only what the attacks before it, on this variant and in this threat model, left right.
            The row counts every image, as left after all of them. Cheap attacks first then save most of a costly one's
            work.
        gradients_from: follow the gradients of this model, a surrogate; the defence itself judges every success. Only
            attacks that can follow them (`purify_fast.attacks.APGD`).
        seed: added to the evaluation's for this attack: another random start of the same attack is another row.
        judge: repeat an evaluation of others, who judge this model by one prediction: it is attacked where there is no
            target, on every image, and it judges. Such a row is about that model and not about the defence: it is in no
            headline and in no ``worst``, and its label, "as ...", names the source.
        published: the publication whose attack this is, where it counts an image as robust by other predictions than a
            row does; the report says so.

    Raises:
        ValueError: options that are not allowed or do not go together.
        TypeError: no attack.
    """

    attack: Attack | AttackFunction
    variant: Variant = "random"
    target: Classifier | Literal["classifier"] | None = None
    aggregation: str | None = None
    label: str | None = None
    max_images: int | None = None
    survivors_only: bool = False
    gradients_from: Classifier | None = None
    seed: int = 0
    judge: Classifier | None = None
    published: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            object.__setattr__(self, "attack", as_attack(self.attack))
        check_literal("variant", self.variant, Variant)
        check_at_least_one(max_images=self.max_images)
        check_not_negative(seed=self.seed)
        if isinstance(self.target, str):
            if self.target != CLASSIFIER:
                raise ValueError(f"target must be a model or {CLASSIFIER!r}, got {self.target!r}")
        elif self.target is not None and not callable(self.target):
            raise TypeError(f"target must be a model or {CLASSIFIER!r}, got {self.target!r}")
        if self.aggregation is not None:
            check_aggregation(self.aggregation)
            if self.target is not None:
                raise ValueError("an attack has a target or an aggregation, not both")
        if self.gradients_from is not None:
            if self.target is not None or self.aggregation is not None:
                raise ValueError("an attack follows the gradients of another model, or has a target or an aggregation")
            if not self.resolved.follows_gradients:
                raise ValueError(f"the attack {self.resolved.kind} cannot follow the gradients of another model")
        if self.judge is not None:
            if not callable(self.judge):
                raise TypeError(f"judge must be a model, got {self.judge!r}")
            if callable(self.target) or self.aggregation or self.gradients_from is not None or self.survivors_only:
                raise ValueError(
                    f"a judge is attacked itself, or judges attacks on the target {CLASSIFIER!r}: it goes with no "
                    "other target, no aggregation, no gradients_from and no survivors_only"
                )
            if not (self.label or "").startswith("as "):
                raise ValueError(f"with a judge the label says whose evaluation it is: 'as ...', got {self.label!r}")
        if isinstance(self.attack, BPDA):
            if self.target is not None:
                raise ValueError("BPDA attacks the defence's own purifier: it takes no target")
            if self.aggregation is not None:
                raise ValueError(f"BPDA has this option itself: BPDA(aggregation={self.aggregation!r})")

    @property
    def resolved(self) -> Attack:
        """The attack; a function is wrapped as one."""
        return cast(Attack, self.attack)

    @property
    def other_model(self) -> Classifier | None:
        """The model that is attacked in the defence's place, whose gradients are followed, or that judges, if any."""
        if callable(self.target):
            return self.target
        return self.judge if self.gradients_from is None else self.gradients_from


def as_specs(attacks: Sequence[Any]) -> list[AttackSpec]:
    """A list of attacks and functions as `AttackSpec`; TypeError for no list, and for what is no attack."""
    if isinstance(attacks, (str, Attack, AttackSpec)) or not isinstance(attacks, Sequence):
        raise TypeError(f"attacks must be a list, got {attacks!r}")
    specs = []
    for i, attack in enumerate(attacks):
        try:
            specs.append(attack if isinstance(attack, AttackSpec) else AttackSpec(attack))
        except TypeError as error:
            raise TypeError(f"attacks[{i}]: {error}") from None
    return specs


def lee_kim_2023(eps: float = 8 / 255) -> AttackSpec:
    """PGD + EOT of Lee & Kim, "Robust evaluation of diffusion-based adversarial purification", ICCV 2023.

    Full gradient, 200 steps of 0.007 at eps = 8/255, of the same share of any other eps, 20 draws averaged before the
    sign is taken, L-inf, no random start. Two things are not in the paper: of the iterates the best is kept, not the
    last; and as in every row, an image counts as robust only if all ``n_eval`` predictions after the attack are right
    (5 of 5 by default). The row's mean counts single predictions.

    Args:
        eps: radius in image units.

    Raises:
        ValueError: an eps below 0 or above 1.
    """
    check_eps(eps, "linf")
    alpha = 0.007 * eps / (8 / 255)
    attack = PGD(steps=200, alpha=alpha, eot_iter=20, random_start=False, eps=eps, norm="linf")
    return AttackSpec(attack, label=LEE_KIM, published="Lee & Kim 2023")
