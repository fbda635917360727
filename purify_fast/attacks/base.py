"""What an attack is, and what it is told.

Each attack is defined once, as a frozen dataclass of its options: `apgd` makes an `APGD` and runs it on one batch.
Whatever the options leave open comes from an `AttackContext`, which an evaluation makes of its report's settings, or
whoever calls the attack.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from .._compiler import outside_graphs
from .._validation import Count, GradientPrecision, Norm, NormName, check_types, read_norm
from ..protocols import Classifier
from ..speed.graphs.step_graphs import StepGraphs
from .arguments import check_at_least_one, check_eps, check_images
from .attacked_model import drawn_once_per_call, frozen
from .ball import Ball, ball_around
from .engine.gradient_copy import COMPARED, GradientCopies, gradient_copy
from .engine.rows import CANDIDATES, ActiveSet, Goals, Judge, Rows, waves
from .losses import Loss, usable_loss
from .objective import Objective
from .search import GradientHealth, better_of

#: A radius in image units: one number, or one for each image, ``[B]``.
Radius = float | Tensor


class ThreatModel(NamedTuple):
    """How far an attack may go."""

    #: "linf", "l2" or "l1"; "flow" where pixels are moved rather than changed.
    norm: str
    #: The radius in image units; of "flow" the largest shift along each axis, half the image being 1.
    eps: float


@dataclass(frozen=True, kw_only=True)
class AttackContext:
    """What an attack is told besides its own options.

    Args:
        eps: radius of the ball in image units, a number or ``[B]``.
        norm: norm of the ball: "linf", "l2" or "l1".
        clip_min: the smallest value of a pixel.
        clip_max: the largest value of a pixel.
        num_classes: classes of the model; 0: not known, so that no loss is replaced by one for fewer classes.
        steps: steps of an attack that does not say how many.
        eot_iter: draws averaged per step by an attack that does not say how many.
        votes: draws that each prediction of the attacked model takes by itself, where it is a vote; a step averages
            over so many votes that their draws are those that were asked for.
        draws_differ: whether two predictions of the attacked model differ; if not, every attack takes one draw.
        judge_draws: fresh draws of a random model, all of which must be misclassified for an image to fall; None: as
            many as are averaged per step. An attack that stops at the first lucky draw would leave weak images behind.
        judge_share: the share of these draws that is enough.
        seed: of everything random.
        begin: points ``[B, ...]`` at which the first run of Auto-PGD begins, as found in a smaller ball; None: a random
            point.
        sample_ids: int64 ``[B]``, the images' indices in their data set; an image's random start depends on the seed
            and its id alone. None: 0 .. B - 1.
        max_forward_batch: images in one forward pass at most, which changes no result; None: no limit.
        batch_size: images that an attack takes together at most, where it tries several targets or restarts of an image
            at once; None: 64, or as many as there are images, if those are more.
        health: counts gradients and movement, if given.
        graphs: on a CUDA device captures the steps of attacks, if given; see `purify_fast.speed.StepGraphs`.
        copies: keeps the copies from which attacks take their gradients for the next attack, if given.
        gradients_from: another model whose gradients are followed, while the attacked model judges every success. Only
            attacks that say so look at it (`Attack.follows_gradients`); None: the attacked model's own gradients.
        warnings: an attack appends what the reader of its result must know.
        fell_to: an attack that tries several targets or restarts adds to the name of each how many images fell to it.
        stood_still: an attack appends, as a tensor [], how many of its images no search came nearer to a border before
            it was given up: that they withstood it says nothing.
        proved: an attack whose search is complete appends, as a tensor [], of how many of its images it has proved that
            no point of the ball is misclassified.

    Raises:
        ValueError: a name or a count that is not allowed.
    """

    eps: Radius = 0.0
    norm: NormName = "linf"
    clip_min: float = 0.0
    clip_max: float = 1.0
    num_classes: int = 0
    steps: int = 100
    eot_iter: int = 1
    votes: int = 1
    draws_differ: bool = True
    judge_draws: int | None = None
    judge_share: float = 1.0
    seed: int = 0
    begin: Tensor | None = None
    sample_ids: Tensor | None = None
    max_forward_batch: int | None = None
    batch_size: int | None = None
    health: GradientHealth | None = None
    graphs: StepGraphs | None = None
    copies: GradientCopies | None = None
    gradients_from: Classifier | None = None
    warnings: list[str] = field(default_factory=list)
    fell_to: dict[str, int] = field(default_factory=dict)
    stood_still: list[Tensor] = field(default_factory=list)
    proved: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_at_least_one(
            judge_draws=self.judge_draws, max_forward_batch=self.max_forward_batch, batch_size=self.batch_size
        )

    def predictions(self, draws: int) -> int:
        """How many predictions take so many draws."""
        return -(-draws // self.votes)

    def judges(self, draws: int) -> int:
        """Fresh predictions by which an image falls, where so many draws are averaged per step."""
        return (self.judge_draws or draws) if self.draws_differ else 1


class Decided(NamedTuple):
    """The options of an attack that may be left open, with the context's in place of those that are."""

    steps: int
    eot_iter: int
    loss: Any


@dataclass(frozen=True, kw_only=True)
class Attack(abc.ABC):
    """An attack with its options; subclasses are frozen dataclasses.

    Args:
        eot_iter: draws of a random model averaged per step: in one batch, or each in a call of its own where the model
            draws once per call. None: the report's.
    """

    #: The attack's name in files: "pgd", "apgd", ...
    kind: ClassVar[str]

    #: Whether `search` can follow the gradients of another model, `AttackContext.gradients_from`.
    follows_gradients: ClassVar[bool] = False

    #: The steps of an attack that leaves them open, whatever the context's; None: the context's.
    usual_steps: ClassVar[int | None] = None

    eot_iter: Count | None = None

    @abc.abstractmethod
    def name(self, context: AttackContext) -> str:
        """A short label of the attack with its options, such as "PGD-100 ce"."""

    @abc.abstractmethod
    def threat_model(self, context: AttackContext) -> ThreatModel:
        """The attack's own ball, or the report's."""

    def draws(self, context: AttackContext) -> int:
        """Predictions of the model averaged per step: one where they do not differ."""
        return context.predictions(self.eot_iter or context.eot_iter) if context.draws_differ else 1

    def decided(self, context: AttackContext) -> Decided:
        """Steps, draws and loss with nothing left open; the margin in place of a loss that needs more classes."""
        loss: Any = getattr(self, "loss", "ce")
        steps = getattr(self, "steps", None) or self.usual_steps or context.steps
        return Decided(steps, self.draws(context), usable_loss(loss, context.num_classes))

    def cost(self, context: AttackContext) -> int | None:
        """Forward passes per image at most; None where that cannot be known before, as of a search that ends early."""
        return None

    @abc.abstractmethod
    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        """Attack what `target` gave.

        Args:
            target: images to logits; an ``nn.Module`` comes back in its mode and with its gradient flags.
            x: images ``[B, C, H, W]`` in [0, 1].
            y: labels, int64 ``[B]``.
            context: what the evaluation tells.

        Returns:
            Adversarial images, shape and dtype of x.
        """

    # a compiler, which cannot trace the choice of the fields, goes on inside of the attack
    @functools.partial(outside_graphs, recursive=False)
    def __call__(self, model: Classifier, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Attack a batch of images without an evaluation, as in ``PGD(steps=3)(model, x, y, eps=8 / 255)``.

        Args:
            model: images to logits; an ``nn.Module`` comes back in its mode and with its gradient flags.
            x: images ``[B, C, H, W]`` in [0, 1].
            y: labels, int64 ``[B]``.
            options: fields of `AttackContext`, such as ``eps``, ``norm`` and ``seed``.

        Returns:
            Adversarial images, shape and dtype of x.

        Raises:
            TypeError: an option that `AttackContext` does not have.
            ValueError: no radius, or images, labels or options that are not allowed.
        """
        context = AttackContext(**options)
        if "eps" not in options and self.threat_model(context).eps == 0:
            raise ValueError(f"eps must be given: {type(self).__name__}(...)(model, x, y, eps=8 / 255)")
        return self.search(self.target(model), x, y, context)

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

    def settings(self, context: AttackContext) -> dict[str, Any]:
        """The options as plain values, with what the context decided in the place of every None it replaced."""
        options = asdict(self)
        decided = {name: value for name, value in self.decided(context)._asdict().items() if name in options}
        return options | decided | {"eot_iter": self.draws(context)} | self.threat_model(context)._asdict()


@dataclass(frozen=True, kw_only=True)
class BallAttack(Attack):
    """An attack within a ball, the report's or one of its own.

    Args:
        eps: radius of another ball than the report's, in image units; None: the report's.
        norm: norm of another ball than the report's: "linf", "l2" or "l1"; None: the report's. It needs an eps.
    """

    #: The norms of the balls that the attack can search.
    norms: ClassVar[tuple[str, ...]] = get_args(Norm)

    eps: float | None = None
    norm: NormName | None = None

    def __post_init__(self) -> None:
        norm = None if self.norm is None else self._known(self.norm)
        if norm is not None and self.eps is None:
            raise ValueError(f"the norm {norm} needs an eps of its own")
        if self.eps is not None:
            check_eps(self.eps, norm)
        # the dataclass is frozen
        object.__setattr__(self, "norm", norm)
        check_types(self)

    def ball(self, x: Tensor, y: Tensor, context: AttackContext) -> Ball:
        """The attack's own ball or the context's, around images that are checked here.

        Raises:
            TypeError: x or y is no tensor.
            ValueError: images, labels, a norm or a radius that are not allowed.
        """
        check_images(x, y, context.clip_min, context.clip_max)
        eps = context.eps if self.eps is None else self.eps
        return ball_around(x, eps, self._known(self.norm or context.norm), context.clip_min, context.clip_max)

    def threat_model(self, context: AttackContext) -> ThreatModel:
        """Norm and radius of the attack's own ball, or of the report's; ValueError for one that is not allowed."""
        norm, eps = self._known(self.norm or context.norm), context.eps if self.eps is None else self.eps
        check_eps(eps, norm)
        return ThreatModel(norm, float(eps))

    def _known(self, norm: str) -> Norm:
        """A norm's name as this package writes it; ValueError for one that the attack cannot search."""
        known = read_norm(norm)
        if known not in self.norms:
            allowed = " or ".join(self.norms)
            raise ValueError(
                f"norm must be {allowed} for {type(self).__name__}, got {norm}: give the attack a ball of its own, "
                f'such as {type(self).__name__}(norm="{self.norms[0]}", eps=0.5)'
            )
        return known


@dataclass(frozen=True, kw_only=True)
class RestartedAttack(Attack):
    """The options of gradient ascent in several runs, of which each image keeps its worst.

    Args:
        loss: "ce", "margin", "scaled_margin" or "dlr", which below 3 classes becomes "margin".
        steps: gradient steps; None: the report's.
        random_start: whether the first run begins at a random point; every further one does.
        keep_best: whether the best point of a run is kept and not the last: misclassified in most draws, then of
            highest mean loss (one more forward pass, or two with several draws).
        restarts: how many runs.
    """

    #: What the attack's name begins with.
    label: ClassVar[str]

    loss: Loss = "ce"
    steps: Count | None = None
    random_start: bool = True
    keep_best: bool = True
    restarts: Count = 1

    def name(self, context: AttackContext) -> str:
        steps, _, loss = self.decided(context)
        return f"{self.label}-{steps} {loss}{times(self.restarts)}"

    def cost(self, context: AttackContext) -> int:
        steps, draws, _ = self.decided(context)
        # the last point, under several draws also the best one, and the clean image, whose prediction health needs
        at_the_end = draws * (2 if draws > 1 else 1) + 1
        comparison = draws if self.restarts > 1 else 0
        return self.restarts * (steps * draws + at_the_end + comparison)

    def revision(self) -> str:
        return "3"

    def worst(
        self,
        attack: Callable[[Objective, int], Tensor],
        model: Classifier,
        x: Tensor,
        y: Tensor,
        context: AttackContext,
    ) -> Tensor:
        """The run after which an image is misclassified in most draws, and of these the one of largest margin.

        A prediction that names no class is misclassified, and its margin is larger than any other: a further run never
        takes a success away. The attack is a function of what is raised and of the number of the run from 0.
        """
        _, draws, loss = self.decided(context)
        with frozen(model):
            apart = drawn_once_per_call(model, x, draws, context.max_forward_batch)
            objective = Objective(model, loss, draws, context.max_forward_batch, context.graphs, apart=apart)
            best = attack(objective, 0)
            if self.restarts == 1:
                return best
            # one draw of every image in a pass at most
            most = min(max(1, len(y)), context.max_forward_batch or len(y) + 1)
            judge = Objective(model, "margin", draws, most, apart=apart)

            def score(points: Tensor) -> Tensor:
                wrong, margins = judge.score(points, y)
                return torch.stack([wrong, margins.masked_fill(margins.isnan(), torch.inf)])

            best_score = score(best)
            for number in range(1, self.restarts):
                points = attack(objective, number)
                best, best_score = better_of(best, best_score, points, score(points))
        return best


@dataclass(frozen=True, kw_only=True)
class EngineAttack(BallAttack):
    """The options of the attacks that judge every success by the model itself, such as `apgd`, `fab_t` and `square`.

    They search on a fast copy of the model. A success of a search is a claim, which the model confirms in its own
    precision, a random one by fresh draws. Images that have fallen leave the batch.

    Args:
        restarts: runs (for each target), each for the images that have not fallen yet.
        precision: what the search computes in: "float32", "bfloat16" (a copy of the model) or "auto" (such a copy where
            it pays). A success is judged by the model itself.
        give_up: whether searches end that would not succeed even at several times their recent pace. That is decided
            after 40, 60 and 80 % of the steps, if there are 50 or more, or from the 500th query on. Auto-PGD never
            does so in the l1 ball or where fallen images stay, and Square with several draws. DeepFool, C&W and
            HopSkipJump refuse it: theirs is no steady pace.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    #: Whether `give_up` is allowed.
    has_pace: ClassVar[bool] = True

    restarts: Count = 1
    precision: GradientPrecision = "auto"
    give_up: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.give_up and not self.has_pace:
            raise ValueError(f"give_up must be False for {type(self).__name__}, which searches to its end, got True")

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        ball = self.ball(x, y, context)
        if len(x) == 0:
            return x.clone()
        x = x.detach().clone()
        ids = torch.arange(len(x), device=x.device) if context.sample_ids is None else context.sample_ids
        _, draws, loss = self.decided(context)
        judges, most = context.judges(draws), context.max_forward_batch
        source = context.gradients_from if self.follows_gradients else None
        with frozen(target):
            apart = drawn_once_per_call(target, x, max(judges, draws), most)
            active = ActiveSet(x, y, ball, Judge(target, judges, most, apart, context.judge_share), ids)
            if source is None:
                source = gradient_copy(target, x[:COMPARED], self.precision, context.copies)
            with frozen(source):
                if source is context.gradients_from:
                    apart = drawn_once_per_call(source, x, draws, most)
                objective = Objective(source, loss, draws, most, context.graphs, apart=apart)
                active.judge_clean_images(leave=self.leaves())
                self.explore(active, objective, context)
                context.stood_still.append((~active.fallen & ~active.tried).sum())
        return active.best

    def leaves(self) -> bool:
        """Whether images leave the attack as soon as they have fallen."""
        return True

    def waves(self, active: ActiveSet, goals: Goals, context: AttackContext, at_image: bool = False) -> Iterator[Rows]:
        """The rows of the runs towards some goals."""
        return waves(
            active, goals, self.restarts, context.fell_to, seed=context.seed, most=context.batch_size,
            at_image=at_image, begin=context.begin,
        )  # fmt: skip

    @abc.abstractmethod
    def explore(self, active: ActiveSet, objective: Objective, context: AttackContext) -> None:
        """Search adversarial images for the clean ones of one batch, or of a group; within `frozen`.

        The objective is the loss that the search raises, on what it follows: another model, a fast copy, or the model
        itself.
        """


@dataclass(frozen=True, kw_only=True)
class TargetedAttack(EngineAttack):
    """The options of those that try one wrong class after the other.

    Args:
        steps: gradient steps of a run; None: as the subclass says.
        n_target_classes: wrong classes that are tried, those whose borders are nearest by the model's linear
            approximation at the image, a run for each; None, or more than there are: all.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    #: The usual number of wrong classes that are tried, AutoAttack's.
    usual_targets: ClassVar[int] = 9

    steps: Count | None = None
    n_target_classes: Count | None = usual_targets

    def full_name(self, name: str, targeted: bool = True) -> str:
        """A name with the number of target classes where that is not the usual one, and of restarts."""
        count = self.n_target_classes
        if targeted and count != self.usual_targets:
            name += f", {'all' if count is None else count} targets"
        return name + times(self.restarts)

    def targets(self, context: AttackContext) -> int | None:
        """How many wrong classes are tried; None for a loss without a target."""
        return min(self.n_target_classes or context.num_classes, context.num_classes - 1)

    def cost_of_order(self, context: AttackContext) -> int:
        """Forward passes per image that it takes to find the borders nearest to it."""
        classes = min(max(self.n_target_classes or context.num_classes, CANDIDATES), context.num_classes - 1)
        return 1 + (classes * self.draws(context) if classes > 1 else 0)

    def settings(self, context: AttackContext) -> dict[str, Any]:
        return super().settings(context) | {"n_target_classes": self.targets(context)}


# a compiler, which cannot trace the choice of the fields, goes on inside of the attack
@functools.partial(outside_graphs, recursive=False)
def run_alone(attack: type[Attack], model: Classifier, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Run an attack without an evaluation; each option is a field of the attack or of `AttackContext`."""
    own = {field.name for field in fields(attack)}
    if issubclass(attack, BallAttack):
        # eps and norm go to the context, because only there eps may be a tensor [B]
        own -= {"eps", "norm"}
    chosen = attack(**{name: value for name, value in options.items() if name in own})
    context = AttackContext(**{name: value for name, value in options.items() if name not in own})
    return chosen.search(model, x, y, context)


def times(restarts: int) -> str:
    """The number of restarts as the end of an attack's name."""
    return f" x{restarts}" if restarts > 1 else ""
