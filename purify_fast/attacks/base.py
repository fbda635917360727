"""What an evaluation asks of an attack, and what it tells it.

An attack is a small frozen dataclass that holds its own options alone. Whatever it leaves open comes from the
`AttackContext`: the report's ball, steps and draws, the seed, and the sizes of batches.
"""

from __future__ import annotations

import abc
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple, get_args

from torch import Tensor

from .._validation import check_literal
from ..protocols import Classifier
from ..speed.step_graphs import StepGraphs
from .arguments import Fallen, Norm, Precision, check_at_least_one, check_eps, check_switch, read_norm
from .engine.gradient_copy import GradientCopies
from .health import GradientHealth


class ThreatModel(NamedTuple):
    """How far an attack may go."""

    #: "linf", "l2" or "l1"; "flow" where pixels are moved rather than changed.
    norm: str
    #: The radius in image units; of "flow" the largest shift along each axis, half the image being 1.
    eps: float


@dataclass(frozen=True, kw_only=True)
class AttackContext:
    """What an evaluation tells an attack.

    Args:
        num_classes: classes of the model.
        eps: radius of the report's ball in image units.
        norm: norm of the report's ball: "linf", "l2" or "l1".
        steps: steps of an attack that does not say how many.
        eot_iter: draws averaged per step by an attack that does not say how many.
        draws_differ: whether two predictions of the attacked model differ; if not, every attack takes one draw.
        fallen: of a random model, by which share of fresh draws an image falls, and is then attacked no more: "any",
            "majority" or "all". An attack that stops at the first lucky draw would leave weak images behind.
        judge_draws: fresh draws for that.
        seed: of everything random.
        sample_ids: int64 ``[B]``, the images' indices in their data set; an image's random start depends on the seed
            and its id alone. None: 0 .. B - 1.
        max_forward_batch: images in one forward pass at most; None: no limit.
        batch_size: images that an attack takes together at most; it is given no more at once.
        health: counts gradients and movement, if given.
        graphs: captures the steps of attacks on a CUDA device, if given.
        copies: keeps the copies from which attacks take their gradients for the next attack, if given.
        gradients_from: another model whose gradients are followed, while the attacked model judges every success. Only
            attacks that say so look at it (`Attack.follows_gradients`); None: the attacked model's own gradients.
        warnings: an attack appends what the reader of its result must know.
        found: an attack that tries several things adds to the name of each how many images fell to it.
    """

    num_classes: int
    eps: float
    norm: Norm = "linf"
    steps: int = 100
    eot_iter: int = 5
    draws_differ: bool = True
    fallen: Fallen = "all"
    judge_draws: int = 5
    seed: int = 0
    sample_ids: Tensor | None = None
    max_forward_batch: int | None = None
    batch_size: int = 250
    health: GradientHealth | None = None
    gradients_from: Classifier | None = None
    graphs: StepGraphs | None = None
    copies: GradientCopies | None = None
    warnings: list[str] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)

    @property
    def judges(self) -> int:
        """Fresh predictions by which an image falls: one of a model that predicts the same every time."""
        return self.judge_draws if self.draws_differ else 1


class Attack(abc.ABC):
    """An attack with its options; subclasses are frozen dataclasses."""

    #: The attack's name in files: "pgd", "apgd", ...
    kind: ClassVar[str]

    #: Whether `search` can follow the gradients of another model, `AttackContext.gradients_from`.
    follows_gradients: ClassVar[bool] = False

    #: Every attack has this option: draws of a random model averaged per step; None: the report's.
    eot_iter: int | None

    @abc.abstractmethod
    def name(self, context: AttackContext) -> str:
        """A short label of the attack with its options, such as "PGD-100 ce"."""

    @abc.abstractmethod
    def threat_model(self, context: AttackContext) -> ThreatModel:
        """The attack's own ball, or the report's.

        Raises:
            ValueError: the attack has no such norm.
        """

    def draws(self, context: AttackContext) -> int:
        """Draws of the model averaged per step: one where they do not differ."""
        return (self.eot_iter or context.eot_iter) if context.draws_differ else 1

    @abc.abstractmethod
    def cost(self, context: AttackContext) -> int | None:
        """Forward passes per image at most; None where that cannot be known before."""

    @abc.abstractmethod
    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        """Attack what `target` gave.

        Args:
            target: images to logits.
            x: images ``[B, C, H, W]`` in [0, 1].
            y: labels, int64 ``[B]``.
            context: what the evaluation tells.

        Returns:
            Adversarial images, shape and dtype of x.
        """

    def revision(self) -> str | None:
        """Names what the attack computes; kept rows of an evaluation are used again only where it is the same.

        None, unless a subclass says otherwise: rows are never kept, since nothing tells when its code changes. A
        subclass that returns a number raises it whenever the same settings would find other images.
        """
        return None

    def identity(self) -> list[str]:
        """Module and name of the code that `revision` is of: two attacks may have the same revision."""
        return [type(self).__module__, type(self).__qualname__]

    def target(self, model: Classifier) -> Classifier:
        """What the attack runs on to fool ``model``: the model itself, where an attack does not say otherwise."""
        return model

    def run(self, model: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        """Adversarial images for a model.

        Args:
            model: images to logits; an ``nn.Module`` comes back in its mode and with its gradient flags.
            x: images ``[B, C, H, W]`` in [0, 1].
            y: labels, int64 ``[B]``.
            context: what the evaluation tells.

        Returns:
            Adversarial images, shape and dtype of x.
        """
        return self.search(self.target(model), x, y, context)

    def settings(self, context: AttackContext) -> dict[str, Any]:
        """The options as plain values, with what the context decided in the place of every None it replaced."""
        norm, eps = self.threat_model(context)
        options = asdict(self)  # type: ignore[call-overload]
        return options | {"norm": norm, "eps": eps, "eot_iter": self.draws(context)}


class BallAttack(Attack):
    """An attack within a ball, the report's or one of its own."""

    #: The names of the norms that the attack knows, a ``Literal``.
    norms: ClassVar[Any] = Norm

    #: The attack's own ball; None: the report's.
    eps: float | None
    norm: Norm | None

    def check_ball(self) -> None:
        """Check the attack's own ball, and write its norm as this package does; for ``__post_init__``.

        Raises:
            ValueError: a radius or norm that is not allowed, or a norm without a radius.
        """
        known = None if self.norm is None else read_norm(self.norm, self.norms)
        if known is not None and self.eps is None:
            raise ValueError(f"the norm {known} needs an eps of its own")
        check_eps(self.eps, known)
        # the dataclass is frozen
        object.__setattr__(self, "norm", known)

    def ball(self, context: AttackContext) -> tuple[Norm, float]:
        """Norm and radius of the attack's own ball, or of the report's.

        Args:
            context: what the evaluation tells.

        Raises:
            ValueError: the attack has no such norm, or the radius is not in image units.
        """
        norm, eps = self.norm or context.norm, context.eps if self.eps is None else float(self.eps)
        allowed = get_args(self.norms)
        if norm not in allowed:
            known = ", ".join(allowed)
            raise ValueError(f"{self.kind}'s norm must be one of {known}, got {norm!r}: leave it out, or name one")
        check_eps(eps, norm)
        return norm, eps

    def threat_model(self, context: AttackContext) -> ThreatModel:
        return ThreatModel(*self.ball(context))


@dataclass(frozen=True, kw_only=True)
class EngineAttack(BallAttack):
    """The options of the attacks that judge every success by the model itself: `apgd`, `fab_t` and `square`.

    Args:
        restarts: runs (for each target), each for the images that have not fallen yet.
        eot_iter: draws of a random model averaged per step; None: the report's.
        precision: what the search computes in: "float32", "bfloat16" (a copy of the model) or "auto" (such a copy where
            it pays). A success is judged by the model itself.
        eps: radius of another ball than the report's, in image units; None: the report's.
        norm: norm of another ball than the report's: "linf", "l2" or "l1"; None: the report's. It needs an eps.
        give_up: whether searches end that would not succeed even at several times their recent pace. That is decided
            after 40, 60 and 80 % of the steps, if there are 50 or more, or from the 1,500th query on. Auto-PGD never
            does so in the l1 ball or where an image falls by fewer than all draws, and Square with several draws.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    restarts: int = 1
    eot_iter: int | None = None
    precision: Precision = "auto"
    eps: float | None = None
    norm: Norm | None = None
    give_up: bool = False

    def __post_init__(self) -> None:
        check_literal("precision", self.precision, Precision)
        check_at_least_one(restarts=self.restarts, eot_iter=self.eot_iter)
        check_switch("give_up", self.give_up)
        self.check_ball()

    def with_restarts(self, name: str) -> str:
        """The name of the attack with the number of its restarts.

        Args:
            name: of one run.
        """
        return name + (f" x{self.restarts}" if self.restarts > 1 else "")

    def options(self, context: AttackContext) -> dict[str, Any]:
        """What the functions of these attacks are all told, as keyword arguments.

        Args:
            context: what the evaluation tells.
        """
        norm, eps = self.ball(context)
        return {
            "eps": eps,
            "norm": norm,
            "eot_iter": self.draws(context),
            "restarts": self.restarts,
            "give_up": self.give_up,
            "fallen": context.fallen,
            "judge_draws": context.judges,
            "precision": self.precision,
            "copies": context.copies,
            "seed": context.seed,
            "sample_ids": context.sample_ids,
            "max_forward_batch": context.max_forward_batch,
        }


@dataclass(frozen=True, kw_only=True)
class TargetedAttack(EngineAttack):
    """The options of those that try one wrong class after the other.

    Args:
        steps: gradient steps of a run; None: as the subclass says.
        n_target_classes: wrong classes that are tried, a run for each; None, or more than there are: all.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    #: The usual number of wrong classes that are tried, AutoAttack's.
    usual_targets: ClassVar[int] = 9

    steps: int | None = None
    n_target_classes: int | None = usual_targets

    def __post_init__(self) -> None:
        check_at_least_one(steps=self.steps, n_target_classes=self.n_target_classes)
        super().__post_init__()

    def with_targets(self, name: str) -> str:
        """The name of the attack with the number of target classes, where that is not the usual one.

        Args:
            name: of the attack.
        """
        count = self.n_target_classes
        return name if count == self.usual_targets else f"{name}, {'all' if count is None else count} targets"

    def targets(self, num_classes: int) -> int:
        """How many wrong classes are tried.

        Args:
            num_classes: classes of the model.
        """
        return min(self.n_target_classes or num_classes, num_classes - 1)

    def options(self, context: AttackContext) -> dict[str, Any]:
        more = {"n_target_classes": self.n_target_classes, "most_rows": context.batch_size}
        return super().options(context) | more | {"health": context.health, "found": context.found}


def cost_of_runs(steps: int, draws: int, restarts: int) -> int:
    """Forward passes per image of `restarts` runs that keep the best point.

    Args:
        steps: gradient steps of a run.
        draws: draws per step.
        restarts: runs of which each image keeps its worst.
    """
    # the last point, under several draws also the best one, and the clean image, whose prediction health needs
    at_the_end = draws * (2 if draws > 1 else 1) + 1
    comparison = draws if restarts > 1 else 0
    return restarts * (steps * draws + at_the_end + comparison)
