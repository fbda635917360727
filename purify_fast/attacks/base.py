"""The interface of an attack, and the settings that it gets from outside.

Each attack is defined once, as a frozen dataclass of its options: `apgd` makes an `APGD` and runs it on one batch.
An `AttackContext` has the settings that the options leave open. An evaluation makes it from its own settings, and a
call without an evaluation makes it from its arguments.
"""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Protocol, get_args

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
from .engine.row_batches import CANDIDATES, FEWEST_STEPS, ActiveSet, Goals, Judge, Rows, waves
from .losses import Loss, usable_loss
from .objective import Objective
from .search import GradientHealth, better_of
from .signatures import Option, check_names, describe, options_of

#: A radius in image units: one number, or one for each image, ``[B]``.
Radius = float | Tensor


class ThreatModel(NamedTuple):
    """The set in which an attack may move an image."""

    #: "linf", "l2" or "l1"; "flow" where pixels are moved rather than changed.
    norm: str
    #: The radius in image units. For "flow": the largest shift along each axis, in units of half the image.
    eps: float


@dataclass(frozen=True, kw_only=True)
class AttackContext:
    """The settings of an attack besides its own options.

    Args:
        eps: radius of the ball in image units, a number or ``[B]``; customary on CIFAR-10 are 8/255 for "linf", 0.5 for
            "l2" and 12 for "l1".
        norm: norm of the ball: "linf", "l2" or "l1".
        clip_min: the smallest value of a pixel.
        clip_max: the largest value of a pixel.
        num_classes: classes of the model. 0: not known; no loss is then replaced by one for fewer classes.
        steps: steps of an attack whose own options leave them open.
        eot_iter: draws averaged per step of an attack whose own options leave them open.
        votes: draws that one prediction of the attacked model takes, if it is a vote of several draws. A step then
            takes fewer predictions, so that the number of draws stays the same.
        draws_differ: whether two predictions of the attacked model differ; if not, every attack takes one draw.
        judge_draws: fresh draws that decide whether an image of a random model has fallen; None: as many as a step
            averages. An attack that stopped at its first lucky draw would leave weak images behind.
        judge_share: the share of these draws that must be misclassified.
        seed: seed of all random numbers.
        begin: points ``[B, ...]`` at which the first run of Auto-PGD begins, such as those found in a smaller ball;
            None: a random point.
        sample_ids: int64 ``[B]``, the indices of the images in their data set. The random start of an image depends
            only on the seed and its index. None: 0 .. B - 1.
        max_forward_batch: the most images in one forward pass; it changes no result. None: no limit.
        batch_size: the most images that an attack searches together, if it tries several targets or restarts of an
            image at once; None: 64, or the number of images if that is larger.
        counts_health: whether the attack counts gradients and movement.
        graphs: captures the steps of attacks on a CUDA device, if given; see `purify_fast.speed.StepGraphs`.
        copies: keeps the copies that give the gradients, so that the next attack uses them too, if given.
        gradients_from: another model whose gradients the attack follows, while the attacked model judges every success.
            Only attacks with `Attack.follows_gradients` use it. None: the gradients of the attacked model.

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
    counts_health: bool = False
    graphs: StepGraphs | None = None
    copies: GradientCopies | None = None
    gradients_from: Classifier | None = None

    def __post_init__(self) -> None:
        check_at_least_one(
            judge_draws=self.judge_draws, max_forward_batch=self.max_forward_batch, batch_size=self.batch_size
        )

    def predictions(self, draws: int) -> int:
        """The number of predictions that take so many draws together."""
        return -(-draws // self.votes)

    def judges(self, draws: int) -> int:
        """The number of fresh predictions that judge an image, if a step averages so many draws."""
        return (self.judge_draws or draws) if self.draws_differ else 1


@dataclass(frozen=True)
class AttackResult:
    """The outcome of an attack on a batch of images.

    Args:
        images: adversarial images, with the shape and dtype of the clean ones.
        health: the counts of gradients and movement; None if nothing was counted.
        warnings: texts that a reader of the result must know.
        fell_to: the number of images that fell to each target and restart, by its name.
        stood_still: the number of images that no search brought nearer to a border before it was given up, a number or
            a tensor []. Their survival says nothing.
        proved: the number of images for which a complete search has proved that no point of the ball is misclassified,
            a number or a tensor [].
    """

    images: Tensor
    health: GradientHealth | None = None
    warnings: list[str] = field(default_factory=list)
    fell_to: dict[str, int] = field(default_factory=dict)
    stood_still: int | Tensor = 0
    proved: int | Tensor = 0


class Decided(NamedTuple):
    """The options that an attack may leave open; the context's values replace those that it does."""

    steps: int
    eot_iter: int
    loss: Any


@dataclass(frozen=True, kw_only=True)
class Attack(abc.ABC):
    """An attack with its options; subclasses are frozen dataclasses.

    Args:
        eot_iter: draws of a random model averaged per step. They stand in one batch; if the model draws once per call,
            each is a call. None: as many as the evaluation takes, and 1 without an evaluation.
    """

    #: The attack's name in files: "pgd", "apgd", ...
    kind: ClassVar[str]

    #: True if `search` can follow the gradients of another model, `AttackContext.gradients_from`.
    follows_gradients: ClassVar[bool] = False

    #: The steps if the options leave them open; None: those of the context.
    usual_steps: ClassVar[int | None] = None

    eot_iter: Count | None = None

    @abc.abstractmethod
    def name(self, context: AttackContext) -> str:
        """A short label of the attack with its options, such as "PGD-100 ce"."""

    @abc.abstractmethod
    def threat_model(self, context: AttackContext) -> ThreatModel:
        """The attack's own ball, or the context's."""

    def draws(self, context: AttackContext) -> int:
        """The predictions of the model that a step averages; 1 if predictions do not differ."""
        return context.predictions(self.eot_iter or context.eot_iter) if context.draws_differ else 1

    def decided(self, context: AttackContext) -> Decided:
        """Steps, draws and loss, none left open; the margin replaces a loss that needs more classes."""
        loss: Any = getattr(self, "loss", "ce")
        steps = getattr(self, "steps", None) or self.usual_steps or context.steps
        return Decided(steps, self.draws(context), usable_loss(loss, context.num_classes))

    def cost(self, context: AttackContext) -> int | None:
        """The most forward passes per image; None if they are not known before, as in a search that ends early."""
        return None

    def may_end_early(self, context: AttackContext) -> bool:
        """Tell whether a search may end before its last step because success is out of reach."""
        return False

    @abc.abstractmethod
    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        """Attack the model that `target` returned.

        Args:
            target: images to logits. An ``nn.Module`` has the same modes and gradient flags afterwards as before.
            x: images ``[B, C, H, W]`` in [0, 1].
            y: labels, int64 ``[B]``.
            context: the settings besides the attack's own options.

        Returns:
            The adversarial images, and what the attack has counted.
        """

    # The compiler cannot trace how the options are sorted. It goes on inside the attack.
    @functools.partial(outside_graphs, recursive=False)
    def __call__(self, model: Classifier, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        """The images of `run`, as in ``PGD(steps=3)(model, x, y, eps=8 / 255)``."""
        return self.run(model, x, y, **options).images

    def run(self, model: Classifier, x: Tensor, y: Tensor, **options: Any) -> AttackResult:
        """Attack a batch of images without an evaluation.

        Args:
            model: images to logits. An ``nn.Module`` has the same modes and gradient flags afterwards as before.
            x: images ``[B, C, H, W]`` in [0, 1].
            y: labels, int64 ``[B]``.
            options: fields of `AttackContext`, such as ``eps``, ``norm`` and ``seed``.

        Returns:
            The adversarial images, and what the attack has counted.

        Raises:
            TypeError: an option that `AttackContext` does not have.
            ValueError: no radius, or images, labels or options that are not allowed.
        """
        check_names("AttackContext", options, (each.name for each in fields(AttackContext)))
        context = AttackContext(**options)
        if "eps" not in options and self.threat_model(context).eps == 0:
            raise ValueError(f"eps must be given: {type(self).__name__}(...)(model, x, y, eps=8 / 255)")
        return self.search(self.target(model), x, y, context)

    def revision(self) -> str | None:
        """The version of the attack's code; an evaluation uses a kept row again only if the version is the same.

        Here it is None: rows are never kept, because nobody can tell when the code has changed. A subclass that returns
        a number raises it whenever the same settings would find other images.
        """
        return None

    def identity(self) -> list[str]:
        """Module and name of the attack's code: the revisions of two attacks may be equal."""
        return [type(self).__module__, type(self).__qualname__]

    def target(self, model: Classifier) -> Classifier:
        """The model that the attack searches in order to fool ``model``; here it is the model itself."""
        return model

    def settings(self, context: AttackContext) -> dict[str, Any]:
        """The options as plain values; the context's values replace those that are None."""
        options = asdict(self)
        decided = {name: value for name, value in self.decided(context)._asdict().items() if name in options}
        return options | decided | {"eot_iter": self.draws(context)} | self.threat_model(context)._asdict()


@dataclass(frozen=True, kw_only=True)
class BallAttack(Attack):
    """An attack within a ball.

    Args:
        eps: radius of the attack's own ball, in image units; None: the ball of the evaluation.
        norm: norm of the attack's own ball: "linf", "l2" or "l1". It needs an eps. None: the norm of the evaluation.
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
        # a frozen dataclass refuses a plain assignment
        object.__setattr__(self, "norm", norm)
        check_types(self)

    def ball(self, x: Tensor, y: Tensor, context: AttackContext) -> Ball:
        """Check the images, and make the attack's own ball or the context's around them.

        Raises:
            TypeError: x or y is no tensor.
            ValueError: images, labels, a norm or a radius that are not allowed.
        """
        check_images(x, y, context.clip_min, context.clip_max)
        eps = context.eps if self.eps is None else self.eps
        return ball_around(x, eps, self._known(self.norm or context.norm), context.clip_min, context.clip_max)

    def threat_model(self, context: AttackContext) -> ThreatModel:
        """Norm and radius of the attack's own ball or the context's; ValueError for values that are not allowed."""
        norm, eps = self._known(self.norm or context.norm), context.eps if self.eps is None else self.eps
        check_eps(eps, norm)
        return ThreatModel(norm, float(eps))

    def _known(self, norm: str) -> Norm:
        """A norm's name as this package writes it; ValueError for a norm that the attack does not support."""
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
    """The options of gradient ascent in several runs; each image keeps the result of its worst run.

    Args:
        loss: "ce", "margin", "scaled_margin" or "dlr", which below 3 classes becomes "margin".
        steps: gradient steps; None: as many as the evaluation takes, and 100 without an evaluation.
        random_start: whether the first run begins at a random point; every further run does.
        keep_best: whether a run returns its best point instead of its last: the point that most draws misclassify, then
            the point of highest mean loss. It takes one more forward pass, or two with several draws.
        restarts: number of runs.
    """

    #: The first word of the attack's name.
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
        # A run judges its last point, and with several draws also its best. Health needs the clean image's prediction.
        at_the_end = draws * (2 if draws > 1 else 1) + 1
        comparison = draws if self.restarts > 1 else 0
        return self.restarts * (steps * draws + at_the_end + comparison)

    def revision(self) -> str:
        return "3"

    def worst(
        self,
        attack: Callable[[Objective, int, GradientHealth | None], Tensor],
        model: Classifier,
        x: Tensor,
        y: Tensor,
        context: AttackContext,
    ) -> AttackResult:
        """Take every run, and keep for each image the point that most draws misclassify, then that of largest margin.

        A prediction with NaN is misclassified, and its margin counts as larger than any other. So a further run never
        takes a success away. ``attack`` takes the objective, the number of the run, from 0, and what counts gradients.
        """
        health = GradientHealth() if context.counts_health else None
        _, draws, loss = self.decided(context)
        with frozen(model):
            apart = drawn_once_per_call(model, x, draws, context.max_forward_batch)
            objective = Objective(model, loss, draws, context.max_forward_batch, context.graphs, apart=apart)
            best = attack(objective, 0, health)
            if self.restarts == 1:
                return AttackResult(best, health)
            # a pass has at most one draw of every image
            most = min(max(1, len(y)), context.max_forward_batch or len(y) + 1)
            judge = Objective(model, "margin", draws, most, apart=apart)

            def score(points: Tensor) -> Tensor:
                wrong, margins = judge.score(points, y)
                return torch.stack([wrong, margins.masked_fill(margins.isnan(), torch.inf)])

            best_score = score(best)
            for number in range(1, self.restarts):
                points = attack(objective, number, health)
                best, best_score = better_of(best, best_score, points, score(points))
        return AttackResult(best, health)


@dataclass(frozen=True, kw_only=True)
class EngineAttack(BallAttack):
    """The options of the attacks that let the model itself judge every success, such as `apgd`, `fab_t` and `square`.

    They search on a fast copy of the model. The search only claims a success. The model confirms it in its own
    precision, and a random model by fresh draws. Images that have fallen leave the batch.

    Args:
        restarts: number of runs for each target; a run searches the images that have not fallen yet.
        precision: precision of the search: "float32", "bfloat16" (in a copy of the model) or "auto" (in such a copy if
            that saves time). The model itself judges every success.
        give_up: whether a search ends if it would not succeed even at several times its recent pace. Attacks by
            gradients decide that after 40, 60 and 80 % of the steps, if there are 50 or more; Square decides it from
            query 500 on. Auto-PGD never gives up in the l1 ball or if fallen images stay, and Square never with several
            draws. DeepFool, C&W and HopSkipJump refuse it, because their pace is not steady.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    #: True if `give_up` is allowed.
    has_pace: ClassVar[bool] = True

    restarts: Count = 1
    precision: GradientPrecision = "auto"
    give_up: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.give_up and not self.has_pace:
            raise ValueError(f"give_up must be False for {type(self).__name__}, which searches to its end, got True")

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        ball = self.ball(x, y, context)
        if len(x) == 0:
            return AttackResult(x.clone())
        x = x.detach().clone()
        ids = torch.arange(len(x), device=x.device) if context.sample_ids is None else context.sample_ids
        _, draws, loss = self.decided(context)
        judges, most = context.judges(draws), context.max_forward_batch
        source = context.gradients_from if self.follows_gradients else None
        with frozen(target):
            apart = drawn_once_per_call(target, x, max(judges, draws), most)
            active = ActiveSet(x, y, ball, Judge(target, judges, most, apart, context.judge_share), ids)
            active.health = GradientHealth() if context.counts_health else None
            if source is None:
                source = gradient_copy(target, x[:COMPARED], self.precision, context.copies)
            with frozen(source):
                if source is context.gradients_from:
                    apart = drawn_once_per_call(source, x, draws, most)
                objective = Objective(source, loss, draws, most, context.graphs, apart=apart)
                active.judge_clean_images(leave=self.leaves())
                self.explore(active, objective, context)
        stood_still = (~active.fallen & ~active.tried).sum()
        return AttackResult(active.best, active.health, fell_to=active.fell_to, stood_still=stood_still)

    def may_end_early(self, context: AttackContext) -> bool:
        return self.give_up and self.decided(context).steps >= FEWEST_STEPS

    def leaves(self) -> bool:
        """Tell whether images leave the attack as soon as they have fallen."""
        return True

    def waves(self, active: ActiveSet, goals: Goals, context: AttackContext, at_image: bool = False) -> Iterator[Rows]:
        """The rows of all runs, wave by wave."""
        return waves(
            active,
            goals,
            self.restarts,
            seed=context.seed,
            most=context.batch_size,
            at_image=at_image,
            begin=context.begin,
        )

    @abc.abstractmethod
    def explore(self, active: ActiveSet, objective: Objective, context: AttackContext) -> None:
        """Search adversarial images for the clean ones of one batch or of a group; within `frozen`.

        The objective is the loss that the search raises, on the attacked model, a fast copy of it or another model.
        """


@dataclass(frozen=True, kw_only=True)
class TargetedAttack(EngineAttack):
    """The options of attacks that try one wrong class after the other.

    Args:
        steps: gradient steps of a run; None: the subclass decides.
        n_target_classes: the number of wrong classes with a run each. They are those with the nearest borders by the
            model's linear approximation at the image. None, or more than there are: all.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    #: The number of wrong classes in AutoAttack.
    usual_targets: ClassVar[int] = 9

    steps: Count | None = None
    n_target_classes: Count | None = usual_targets

    def full_name(self, name: str, targeted: bool = True) -> str:
        """A name with the number of target classes, if it is not the usual number, and of restarts."""
        count = self.n_target_classes
        if targeted and count != self.usual_targets:
            name += f", {'all' if count is None else count} targets"
        return name + times(self.restarts)

    def targets(self, context: AttackContext) -> int | None:
        """The number of wrong classes with a run each; None for a loss without a target."""
        return min(self.n_target_classes or context.num_classes, context.num_classes - 1)

    def cost_of_order(self, context: AttackContext) -> int:
        """The forward passes per image that find its nearest borders."""
        classes = min(max(self.n_target_classes or context.num_classes, CANDIDATES), context.num_classes - 1)
        return 1 + (classes * self.draws(context) if classes > 1 else 0)

    def settings(self, context: AttackContext) -> dict[str, Any]:
        return super().settings(context) | {"n_target_classes": self.targets(context)}


# The compiler cannot trace how the options are sorted. It goes on inside the attack.
@functools.partial(outside_graphs, recursive=False)
def run_alone(attack: type[Attack], model: Classifier, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Run an attack without an evaluation.

    Args:
        attack: the class of the attack.
        model: images to logits.
        x: images ``[B, ...]``.
        y: labels, int64 ``[B]``.
        **options: fields of the attack or of `AttackContext`. If both have a field, it is the attack's. Or ``health``,
            to which the counts of gradients and movement are added.

    Returns:
        Adversarial images, shape and dtype of x.

    Raises:
        TypeError: an option that neither of them has, or no radius for an attack in a ball.
    """
    own, told = _options_of_call(attack)
    health: GradientHealth | None = options.pop("health", None)
    check_names(attack.__name__, options, own | told)
    if "eps" in told and "eps" not in options:
        raise TypeError(f"eps is missing: {attack.__name__} needs a radius in image units, such as eps=8 / 255")
    chosen = attack(**{name: value for name, value in options.items() if name in own})
    given = {name: value for name, value in options.items() if name in told}
    result = chosen.search(model, x, y, AttackContext(**given, counts_health=health is not None))
    if health is not None and result.health is not None:
        health.add(**result.health.counts)
    return result.images


@functools.cache
def _options_of_call(attack: type[Attack]) -> tuple[dict[str, Option], dict[str, Option]]:
    """The options of a call without an evaluation, by name: the fields of the attack, and those of its context."""
    own, told = options_of(attack), options_of(AttackContext)
    del told["counts_health"]
    if issubclass(attack, BallAttack):
        # only the context's eps may be a tensor [B]
        del own["eps"], own["norm"]
    return own, {name: option for name, option in told.items() if name not in own}


class AttackCall(Protocol):
    """An attack as a function. ``inspect.signature`` shows all of its options."""

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Attack a batch of images."""


def as_function(name: str, attack: type[Attack], returns: str, **defaults: Any) -> AttackCall:
    """The function that runs an attack on one batch.

    Its signature and docstring are made from the fields of the attack and of `AttackContext`.

    Args:
        name: the name of the function in the attack's module.
        attack: the class of the attack.
        returns: the sentence of the docstring about the images that the function returns.
        **defaults: the defaults that differ from those of the fields.

    Returns:
        The function.
    """

    def call(model: Classifier, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return run_alone(attack, model, x, y, **{**defaults, **options})

    own, told = _options_of_call(attack)
    options = own | told | _HEALTH
    if "eps" in told:
        # the radius, which every call gives, stands first
        options = {"eps": told["eps"]} | options
        options["eps"] = told["eps"]._replace(default=inspect.Parameter.empty)
    options |= {option: options[option]._replace(default=value) for option, value in defaults.items()}
    call.__name__ = call.__qualname__ = name
    call.__module__ = attack.__module__
    summary = inspect.cleandoc(attack.__doc__ or "").partition("\n\nArgs:")[0].partition("\n\nRaises:")[0]
    describe(call, _BATCH | options, Tensor, summary, {"Returns": [returns + _SHAPE], "Raises": _ERRORS})
    return call


#: The parameters of every attack's function.
_BATCH = {
    "model": Option(
        Classifier,
        "images ``[B, ...]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack, then restored.",
    ),
    "x": Option(Tensor, "images, floating point ``[B, ...]`` in [clip_min, clip_max]."),
    "y": Option(Tensor, "true labels, int64 ``[B]``."),
}
_HEALTH = {"health": Option(GradientHealth | None, "gets the counts of gradients and movement, if given.", None)}
_SHAPE = (
    " Shape and dtype are those of x. Up to the rounding of this dtype, the images lie within the radius and within "
    "[clip_min, clip_max]."
)
_ERRORS = (
    "TypeError: x or y is no tensor, there is no such option, or a radius is missing.",
    "RuntimeError: the attack takes gradients, and the call stands within ``torch.inference_mode()``.",
    "ValueError: a shape, dtype, name, count or range that is not allowed; or a model that writes to its input.",
)


def times(restarts: int) -> str:
    """The number of restarts as the end of an attack's name."""
    return f" x{restarts}" if restarts > 1 else ""
