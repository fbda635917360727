"""Specifications of attacks: the attack for each row of a report, a user's function, and a published attack."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from .._validation import NormName, check_literal
from ..attacks import BPDA, PGD, Attack, AttackContext, AttackResult, LeavingPGD, frozen
from ..attacks.arguments import check_at_least_one, check_eps, check_not_negative
from ..attacks.base import NORMS, ThreatModel
from ..attacks.bpda import Aggregation
from ..ops.pgd_step import pgd_step
from ..protocols import Classifier
from .other_packages import OtherAttack, of_other_package
from .subject import Variant

AttackFunction = Callable[[Classifier, Tensor, Tensor], Tensor]
#: The rounding error that is allowed in a value of a float32 image in [0, 1]. It is more than two additions of numbers
#: up to 2 can cause.
ROUNDING = 2.0**-21
#: The value of `AttackSpec.target` that means the defence's own classifier.
CLASSIFIER = "classifier"
LEE_KIM = "PGD-200 ce + EOT (Lee & Kim 2023)"


# -- functions of the user's ------------------------------------------------------------------------------------------


def as_attack(
    function: AttackFunction,
    *,
    name: str | None = None,
    eps: float | None = None,
    norm: NormName | None = None,
    revision: str | None = None,
) -> FunctionAttack:
    """Make an attack of a function, for `evaluate` or an `AttackSpec`.

    Args:
        function: ``(model, x, y) -> x_adv``. It gets a module from images to logits in evaluation mode, float32 images
            ``[B, C, H, W]`` in [0, 1] and int64 labels ``[B]`` on the model's device, with gradients enabled, and must
            return images of the same shape and dtype, in [0, 1] and in the ball. Or an attack of torchattacks, Foolbox
            or ART, which runs unchanged on the judged model: see `purify_fast.evaluation.other_packages`.
        name: name of the row; the function's own name if None.
        eps: radius of the ball in image units, if it is not the report's.
        norm: norm of that ball; it needs an eps.
        revision: names what the function computes. Without a revision every `evaluate` makes the function's rows anew;
            with a revision rows are kept, so change it whenever the function would find other images. Functions are
            told apart by module and name: two lambdas, or two functions returned by the same function, need different
            revisions.

    Raises:
        TypeError: function is not callable.
        ValueError: name is empty, the ball is not allowed, or an attack of another package is made for other images or
            labels.
    """
    given: Any = function
    other = of_other_package(given)
    if other is not None:
        return FunctionAttack(function=other, row_name=name or other.name, eps=eps, norm=norm, own_revision=revision)
    if isinstance(given, type) and issubclass(given, Attack):
        raise TypeError(f"an attack must be an object, got the class {given.__name__}: write {given.__name__}()")
    if not callable(given):
        raise TypeError(
            "an attack must be an object of purify_fast.attacks, such as PGD(), an attack of torchattacks, Foolbox or "
            f"ART, an AttackSpec, or a function (model, x, y) -> x_adv, got {given!r}"
        )
    if name is None:
        name = getattr(function, "__name__", type(function).__name__)
    return FunctionAttack(function=function, row_name=name, eps=eps, norm=norm, own_revision=revision)


@dataclass(frozen=True, kw_only=True)
class FunctionAttack(Attack):
    """A function as an attack; made by `as_attack`.

    Args:
        eps: radius of the attack's own ball, in image units; None: the ball of the evaluation.
        norm: norm of the attack's own ball, which needs an eps; None: the norm of the evaluation.
        function: ``(model, x, y) -> x_adv``.
        row_name: name of the row.
        own_revision: names what the function computes; None: rows are never kept.
    """

    kind: ClassVar[str] = "function"
    norms: ClassVar[tuple[str, ...]] = NORMS

    eps: float | None = None
    norm: NormName | None = None
    function: AttackFunction | OtherAttack
    row_name: str
    own_revision: str | None = None

    def __post_init__(self) -> None:
        if not self.row_name:
            raise ValueError(f"the name of an attack must not be empty, got {self.row_name!r}")
        super().__post_init__()

    def name(self, context: AttackContext) -> str:
        return self.row_name

    def draws(self, context: AttackContext) -> int:
        """Always 1, since the function averages draws itself."""
        return 1

    def threat_model(self, context: AttackContext) -> ThreatModel:
        threat = super().threat_model(context)
        if isinstance(self.function, OtherAttack):
            self.function.check_ball(threat)
        return threat

    def settings(self, context: AttackContext) -> dict[str, Any]:
        norm, eps = self.threat_model(context)
        return {"norm": norm, "eps": eps}

    def revision(self) -> str | None:
        return self.own_revision

    def identity(self) -> list[str]:
        """Module and name of the function, or of the class of an object that is called."""
        function: Any = self.function
        while isinstance(function, functools.partial):
            function = function.func
        function = function.attack if isinstance(function, OtherAttack) else function
        named = function if inspect.isroutine(function) else type(function)
        return [str(named.__module__), named.__qualname__]

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        """Call the function on one batch and check what it returns.

        Args:
            target: images to logits.
            x: images ``[B, C, H, W]`` in [0, 1].
            y: labels, int64 ``[B]``.
            context: context of the attack.

        Returns:
            The function's images, and the warnings.

        Raises:
            TypeError: the result is not a tensor.
            ValueError: the result has a wrong shape or dtype, NaN, or a point outside [0, 1] or the ball.
        """
        # The block restores the modes and gradients, which attacks of other packages may switch.
        threat, warnings = self.threat_model(context), list[str]()
        with torch.enable_grad(), frozen(target):
            if isinstance(self.function, OtherAttack):
                images = self.function.run(target, x.clone(), y.clone(), threat, warnings)
            else:
                images = self.function(target, x.clone(), y.clone())
        check_adversarial(self.row_name, images, x, threat)
        # Rounding may have left values slightly outside the ball or [0, 1]. Move them back to the border.
        inside = pgd_step(images.detach(), torch.zeros_like(x), x, 0.0, threat.eps, norm=threat.norm)
        return AttackResult(inside, warnings=warnings)


def check_adversarial(name: str, images: object, x: Tensor, threat: ThreatModel) -> None:
    """Refuse attacked images that are not allowed, given the clean images x in [0, 1].

    No radius is checked for a norm that does not measure changes of pixels, such as "flow".

    Raises:
        TypeError: images is not a tensor.
        ValueError: images have a wrong shape or dtype, NaN, or a point outside [0, 1] or the ball by more than
            rounding; the message says by how much, and what is allowed.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"the attack {name!r} must return a torch.Tensor, got {type(images).__name__}")
    if images.shape != x.shape or images.dtype != x.dtype or images.device != x.device:
        raise ValueError(
            f"the attack {name!r} must return {x.dtype} images {list(x.shape)} on {x.device}, "
            f"got {images.dtype} {list(images.shape)} on {images.device}"
        )
    images = images.detach()
    if not bool(images.isfinite().all()):
        raise ValueError(
            f"the attack {name!r} returned {int((~images.isfinite()).sum())} values that are not finite: all values "
            "must be numbers in [0, 1]"
        )
    beyond = float(torch.maximum(-images.amin(), images.amax() - 1)) if images.numel() else 0.0
    if beyond > ROUNDING:
        raise ValueError(
            f"the attack {name!r} returned values from {float(images.amin()):.6g} to {float(images.amax()):.6g}: "
            f"{beyond:.3g} outside the allowed range [0, 1]"
        )
    how_far = moved(images, x, threat)
    if how_far is not None and len(images) and float(how_far[0].amax()) > how_far[1]:
        worst, length = int(how_far[0].argmax()), float(how_far[0].amax())
        raise ValueError(
            f"the attack {name!r} left the ball: image {worst} of the batch is moved by {length:.6g} in the norm "
            f"{threat.norm}, {length - threat.eps:.3g} more than the allowed eps = {threat.eps:.6g}"
        )


def moved(images: Tensor, x: Tensor, threat: ThreatModel) -> tuple[Tensor, float] | None:
    """The distance by which each image was moved, float64 ``[B]``, and the allowed distance with rounding.

    Args:
        images: attacked images ``[B, C, H, W]``.
        x: the clean ones.
        threat: the ball.

    Returns:
        None for a norm that does not measure changes of pixels, such as "flow".
    """
    order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}.get(threat.norm)
    if order is None:
        return None
    lengths = torch.linalg.vector_norm((images - x).flatten(1).double(), ord=order, dim=1)
    # Allow as much as the norm of an image whose values all have the allowed rounding error.
    count = {"linf": 1.0, "l2": x[0].numel() ** 0.5, "l1": float(x[0].numel())}[threat.norm] if len(x) else 1.0
    return lengths, threat.eps * (1 + 1e-5) + ROUNDING * count


# -- the attack of a row ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttackSpec:
    """An attack and its use for a row: its target, its images, and its name.

    Args:
        attack: one of `purify_fast.attacks`, or a function ``(model, x, y) -> x_adv`` (see `as_attack`).
        variant: the mode of the model that is attacked and judged: ``random``, as it is; ``fixed``, every image under
            the same noise; ``deterministic``, without noise.
        target: a model to attack in place of the defence, which judges the result: for a transfer attack, or another
            view of the defence. ``"classifier"``: the defence's own classifier alone; the row's name says how little
            that shows.
        aggregation: a method of `purify_fast.ops.aggregate` for the samples of the attacked defence; the defence is
            judged as it is. BPDA has its own option for this.
        label: the row's name; made from the other fields if None. A threat model other than the report's, or the
            target ``"classifier"``, is added to it.
        max_images: attack only this number of first images; None: all.
        survivors_only: attack only images that earlier attacks, on this variant and in this threat model, left right.
            The row counts every image, as left after all of these attacks. Cheap attacks first then save most of a
            costly attack's work.
        gradients_from: a surrogate model whose gradients are followed; the defence itself judges every success. Only
            for attacks that support it (`purify_fast.attacks.APGD`).
        seed: added to the evaluation's seed for this attack: another random start of the same attack is another row.
        judge: the model of an evaluation by others, who judge it by one prediction. It judges every image, and is
            attacked unless there is a target. Such a row says nothing about the defence: it enters neither the headline
            nor ``worst``, and its label, "as ...", names the source.
        until: search the images first to which earlier attacks came nearest, and stop when at most this share of all
            images can still fall among the rest, at 95 % (`purify_fast.evaluation.stopping`). With None, or a random
            model, whose images fall bit by bit, every image is searched.
        nearest: attack only this number of images, those to which earlier attacks came nearest; None: all.
        published: the publication of this attack, if it counts an image as robust by other predictions than a row
            does; the report says so.

    Raises:
        ValueError: options that are not allowed or contradict each other.
        TypeError: attack is not an attack.
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
    until: float | None = None
    nearest: int | None = None
    published: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            object.__setattr__(self, "attack", as_attack(self.attack))
        check_literal("variant", self.variant, Variant)
        check_at_least_one(max_images=self.max_images, nearest=self.nearest)
        if self.until is not None and not 0 < self.until < 1:
            raise ValueError(f"until must be a share of the images between 0 and 1, such as 0.002, got {self.until!r}")
        check_not_negative(seed=self.seed)
        if self.target is not None and self.target != CLASSIFIER and not callable(self.target):
            raise TypeError(f"target must be a model or {CLASSIFIER!r}, got {self.target!r}")
        options = ("target", "aggregation", "gradients_from")
        given = [option for option in options if getattr(self, option) is not None]
        if len(given) > 1:
            raise ValueError(f"an attack takes at most one of {', '.join(options)}, got {' and '.join(given)}")
        if self.aggregation is not None:
            check_literal("aggregation", self.aggregation, Aggregation)
        if self.gradients_from is not None and not self.resolved.follows_gradients:
            raise ValueError(
                "gradients_from needs an attack that can follow the gradients of another model, such as APGD, got "
                f"{self.resolved.kind}"
            )
        if self.judge is not None:
            if not callable(self.judge):
                raise TypeError(f"judge must be a model, a callable from images to logits, got {self.judge!r}")
            if callable(self.target) or self.aggregation or self.gradients_from is not None or self.survivors_only:
                raise ValueError(
                    f"with a judge, the attack is on the judge itself or on the target {CLASSIFIER!r}: leave out any "
                    "other target, aggregation, gradients_from and survivors_only"
                )
            if not (self.label or "").startswith("as "):
                raise ValueError(
                    "with a judge, label must begin with 'as ' and say whose evaluation the row repeats, got "
                    f"{self.label!r}"
                )
        if isinstance(self.attack, BPDA):
            if self.target is not None:
                raise ValueError(
                    f"target must be None for BPDA, which attacks the defence's own purifier, got {self.target!r}"
                )
            if self.aggregation is not None:
                raise ValueError(f"give aggregation to BPDA itself: BPDA(aggregation={self.aggregation!r})")

    @property
    def resolved(self) -> Attack:
        """The attack; a function is wrapped as an attack."""
        return cast(Attack, self.attack)

    @property
    def other_model(self) -> Classifier | None:
        """The model besides the defence that is attacked, gives gradients, or judges; None if there is none."""
        if callable(self.target):
            return self.target
        return self.judge if self.gradients_from is None else self.gradients_from


def as_specs(attacks: Sequence[Any]) -> list[AttackSpec]:
    """Make `AttackSpec` of a list of attacks and functions; TypeError if it is not a list of these."""
    if isinstance(attacks, (str, Attack, AttackSpec)) or not isinstance(attacks, Sequence):
        raise TypeError(f"attacks must be a list, got {attacks!r}: give a single attack as [attack]")
    specs = []
    for i, attack in enumerate(attacks):
        try:
            specs.append(attack if isinstance(attack, AttackSpec) else AttackSpec(attack))
        except TypeError as error:
            raise TypeError(f"attacks[{i}]: {error}") from None
    return specs


def lee_kim_2023(eps: float = 8 / 255, *, leave: bool = False) -> AttackSpec:
    """PGD + EOT of Lee & Kim, "Robust evaluation of diffusion-based adversarial purification", ICCV 2023.

    Full gradient, 200 steps of 0.007 at eps = 8/255, or of the same share of any other eps, 20 draws averaged before
    the sign is taken, L-inf, no random start. Two things differ from the paper: the best iterate is kept, not the last;
    and as in every row, an image counts as robust only if all ``n_eval`` predictions after the attack are right (5 of 5
    by default). The row's mean counts single predictions.

    Args:
        eps: radius in image units.
        leave: whether an image's attack ends once all 20 draws of a step are wrong (`LeavingPGD`).

    Raises:
        ValueError: eps is below 0 or above 1.
    """
    check_eps(eps, "linf")
    kind, label = (LeavingPGD, f"{LEE_KIM}, left when 20 draws are wrong") if leave else (PGD, LEE_KIM)
    attack = kind(steps=200, alpha=0.007 * eps / (8 / 255), eot_iter=20, random_start=False, eps=eps, norm="linf")
    return AttackSpec(attack, label=label, published="Lee & Kim 2023")
