"""The interface of an attack, and its call without an evaluation.

Each attack is defined once, as a frozen dataclass of its options: `apgd` makes an `APGD` and runs it on one batch. An
`AttackContext` has the settings that the options leave open.
"""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from .._compiler import outside_graphs
from .._validation import Count, GradientPrecision, Norm, NormName, check_types, read_norm
from ..protocols import Classifier
from .arguments import check_eps, check_images
from .attacked_model import drawn_once_per_call, frozen
from .ball import Ball, ball_around
from .context import AttackContext, Resources
from .engine.row_batches import FEWEST_STEPS, ActiveSet, Judge
from .gradient_copy import COMPARED, gradient_copy
from .losses import usable_loss
from .objective import Objective
from .search import GradientHealth, better_of
from .signatures import check_names, docstring, parameters_of, texts_of

#: The norms of the balls that most attacks can search.
NORMS: tuple[str, ...] = get_args(Norm)
#: The number of wrong classes that AutoAttack's targeted attacks try.
USUAL_TARGETS = 9


class ThreatModel(NamedTuple):
    """The set in which an attack may move an image."""

    #: "linf", "l2" or "l1"; "flow" where pixels are moved rather than changed.
    norm: str
    #: The radius in image units. For "flow": the largest shift along each axis, in units of half the image.
    eps: float


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
    """The options that an attack may leave open; values of the context replace the open ones."""

    steps: int
    eot_iter: int
    loss: Any
    #: The number of wrong classes that are targeted, in one run each; None if the attack has no targets.
    n_target_classes: int | None


@dataclass(frozen=True, kw_only=True)
class Attack(abc.ABC):
    """An attack with its options; subclasses are frozen dataclasses.

    A subclass with `norms` searches a ball, and has the fields ``eps`` and ``norm`` for a ball of its own.

    Args:
        eot_iter: draws of a random model that are averaged in each step. They are computed in one batch; if the model
            draws once per call, each draw takes one call. None: as many as the evaluation takes, and 1 without an
            evaluation.
    """

    #: The attack's name in files: "pgd", "apgd", ...
    kind: ClassVar[str]

    #: The version of the attack's code, which `revision` returns. It must be raised whenever the same settings would
    #: find other images.
    code_version: ClassVar[str | None] = None

    #: The norms of the balls that the attack can search. Empty: the attack searches no ball and overrides
    #: `threat_model`.
    norms: ClassVar[tuple[str, ...]] = ()

    #: True if `search` can follow the gradients of another model, `AttackContext.gradients_from`.
    follows_gradients: ClassVar[bool] = False

    #: The number of steps if the options leave it open. None: the number of the context.
    usual_steps: ClassVar[int | None] = None

    eot_iter: Count | None = None

    def __post_init__(self) -> None:
        if self.norms:
            own: Any = self
            norm = None if own.norm is None else self._known(own.norm)
            if norm is not None and own.eps is None:
                raise ValueError(f"eps must be given with norm={norm!r}: the ball needs a radius, such as eps=0.5")
            if own.eps is not None:
                check_eps(own.eps, norm)
            # A frozen dataclass refuses a plain assignment.
            object.__setattr__(self, "norm", norm)
            check_types(self)

    @abc.abstractmethod
    def name(self, context: AttackContext) -> str:
        """A short label of the attack with its options, such as "PGD-100 ce"."""

    def threat_model(self, context: AttackContext) -> ThreatModel:
        """The attack's own ball or the context's; ValueError for a norm or a radius that is not allowed."""
        norm, eps = self._norm_and_radius(context)
        check_eps(eps, norm)
        return ThreatModel(norm, float(eps))

    def ball(self, x: Tensor, y: Tensor, context: AttackContext) -> Ball:
        """Check the images, and make the attack's own ball or the context's around them.

        Raises:
            TypeError: x or y is no tensor.
            ValueError: images, labels, a norm or a radius that are not allowed.
        """
        check_images(x, y, context.clip_min, context.clip_max)
        norm, eps = self._norm_and_radius(context)
        return ball_around(x, eps, norm, context.clip_min, context.clip_max)

    def _norm_and_radius(self, context: AttackContext) -> tuple[Norm, Any]:
        """The norm and the radius of the attack's own ball or the context's."""
        if not self.norms:
            raise NotImplementedError(f"{type(self).__name__} must define threat_model(context)")
        own: Any = self
        return self._known(own.norm or context.norm), context.eps if own.eps is None else own.eps

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

    def draws(self, context: AttackContext) -> int:
        """The predictions of the model that a step averages; 1 if predictions do not differ."""
        return context.predictions(self.eot_iter or context.eot_iter) if context.draws_differ else 1

    def decided(self, context: AttackContext) -> Decided:
        """Steps, draws, loss and targets, none left open; the margin replaces a loss that needs more classes."""
        steps = getattr(self, "steps", None) or self.usual_steps or context.steps
        loss: Any = getattr(self, "loss", "ce")
        targets = getattr(self, "n_target_classes", None) or context.num_classes
        loss, targets = usable_loss(loss, context.num_classes), min(targets, context.num_classes - 1)
        return Decided(steps, self.draws(context), loss, targets)

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

    # torch.compile cannot trace how the options are shared out between attack and context. So it skips this function,
    # and compiles inside the attack again.
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
            options: fields of `AttackContext` and of its `Resources`, such as ``eps``, ``norm`` and ``seed``.

        Returns:
            The adversarial images, and what the attack has counted.

        Raises:
            TypeError: an option that neither of them has.
            ValueError: no radius, or images, labels or options that are not allowed.
        """
        context = AttackContext.from_options(**options)
        if "eps" not in options and self.threat_model(context).eps == 0:
            raise ValueError(f"eps must be given: {type(self).__name__}(...)(model, x, y, eps=8 / 255)")
        return self.search(self.target(model), x, y, context)

    def revision(self) -> str | None:
        """The version of the attack's code; an evaluation uses a kept row again only if the version is the same.

        If it is None, rows are never kept, because nobody can tell when the code has changed.
        """
        return self.code_version

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
        return options | decided | self.threat_model(context)._asdict()


def times(restarts: int) -> str:
    """The number of restarts as the end of an attack's name."""
    return f" x{restarts}" if restarts > 1 else ""


# -- attacks that follow the gradient of the model itself -------------------------------------------------------------


def cost_of_ascents(attack: Any, context: AttackContext) -> int:
    """The forward passes per image of `worst_of_runs`."""
    steps, draws, *_ = attack.decided(context)
    # Each run scores its last point, and with several draws also its best point. Health needs the prediction of the
    # clean image.
    at_the_end = draws * (2 if draws > 1 else 1) + 1
    comparison = draws if attack.restarts > 1 else 0
    return attack.restarts * (steps * draws + at_the_end + comparison)


def worst_of_runs(
    attack: Any,
    one_run: Callable[[Objective, int, GradientHealth | None], Tensor],
    batch: tuple[Classifier, Tensor, Tensor],
    context: AttackContext,
) -> AttackResult:
    """Take every run, and keep for each image the point that most draws misclassify, then that of largest margin.

    A prediction with NaN is misclassified, and its margin counts as larger than any other. So a further run never takes
    a success away.

    Args:
        attack: an attack with ``restarts``.
        one_run: takes the objective, the number of the run, from 0, and what counts gradients.
        batch: the attacked model, the images and their labels.
        context: the settings besides the attack's own options.
    """
    model, x, y = batch
    resources = context.resources
    health = GradientHealth() if resources.counts_health else None
    _, draws, loss, _ = attack.decided(context)
    with frozen(model):
        apart = drawn_once_per_call(model, x, draws, resources.max_forward_batch)
        objective = Objective(model, loss, draws, resources.max_forward_batch, resources.graphs, apart=apart)
        best = one_run(objective, 0, health)
        if attack.restarts == 1:
            return AttackResult(best, health)
        # Each forward pass contains at most one draw of every image.
        most = min(max(1, len(y)), resources.max_forward_batch or len(y) + 1)
        judge = Objective(model, "margin", draws, most, apart=apart)

        def score(points: Tensor) -> Tensor:
            wrong, margins = judge.score(points, y)
            return torch.stack([wrong, margins.masked_fill(margins.isnan(), torch.inf)])

        best_score = score(best)
        for number in range(1, attack.restarts):
            points = one_run(objective, number, health)
            best, best_score = better_of(best, best_score, points, score(points))
    return AttackResult(best, health)


# -- attacks whose successes the model itself judges ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EngineAttack(Attack):
    """The options of the attacks that let the model itself judge every success, such as `apgd`, `fab_t` and `square`.

    They search on a fast copy of the model. The search only claims a success. The model confirms it in its own
    precision, and a random model by fresh draws. Images that have fallen leave the batch.

    Args:
        eps: radius of the attack's own ball, in image units; None: the ball of the evaluation.
        norm: norm of the attack's own ball: "linf", "l2" or "l1". It needs an eps. None: the norm of the evaluation.
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

    norms: ClassVar[tuple[str, ...]] = NORMS
    #: True if `give_up` is allowed.
    has_pace: ClassVar[bool] = True

    eps: float | None = None
    norm: NormName | None = None
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
        _, draws, loss, _ = self.decided(context)
        judges, resources = context.judges(draws), context.resources
        most = resources.max_forward_batch
        source = context.gradients_from if self.follows_gradients else None
        with frozen(target):
            apart = drawn_once_per_call(target, x, max(judges, draws), most)
            active = ActiveSet(x, y, ball, Judge(target, judges, most, apart, context.judge_share), ids)
            active.health = GradientHealth() if resources.counts_health else None
            if source is None:
                source = gradient_copy(target, x[:COMPARED], self.precision, resources.copies)
            with frozen(source):
                if source is context.gradients_from:
                    apart = drawn_once_per_call(source, x, draws, most)
                objective = Objective(source, loss, draws, most, resources.graphs, apart=apart)
                active.judge_clean_images(leave=getattr(self, "leave_when_fallen", True))
                self.explore(active, objective, context)
        stood_still = (~active.fallen & ~active.tried).sum()
        return AttackResult(active.best, active.health, fell_to=active.fell_to, stood_still=stood_still)

    def may_end_early(self, context: AttackContext) -> bool:
        return self.give_up and self.decided(context).steps >= FEWEST_STEPS

    @abc.abstractmethod
    def explore(self, active: ActiveSet, objective: Objective, context: AttackContext) -> None:
        """Search adversarial images for the clean ones of one batch or of a group; within `frozen`.

        The objective is the loss that the search raises, on the attacked model, a fast copy of it or another model.
        """


def targets_and_times(n_target_classes: int | None, restarts: int) -> str:
    """The number of target classes, if it is not the usual number, and of restarts as the end of an attack's name."""
    count = "all" if n_target_classes is None else n_target_classes
    return (f", {count} targets" if count != USUAL_TARGETS else "") + times(restarts)


# -- the attacks as functions -----------------------------------------------------------------------------------------


# torch.compile cannot trace how the options are shared out between attack and context. So it skips this function, and
# compiles inside the attack again.
@functools.partial(outside_graphs, recursive=False)
def run_alone(attack: type[Attack], model: Classifier, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Run an attack without an evaluation.

    Args:
        attack: the class of the attack.
        model: images to logits.
        x: images ``[B, ...]``.
        y: labels, int64 ``[B]``.
        **options: fields of the attack, of `AttackContext` or of `Resources`. If the attack has a field of the context,
            it is the attack's. Or ``health``, to which the counts of gradients and movement are added.

    Returns:
        Adversarial images, shape and dtype of x.

    Raises:
        TypeError: an option that none of them has, or no radius for an attack in a ball.
    """
    own, shared = _options_of_call(attack)
    health: GradientHealth | None = options.pop("health", None)
    check_names(attack.__name__, options, own | shared)
    if "eps" in shared and "eps" not in options:
        raise TypeError(f"eps is missing: {attack.__name__} needs a radius in image units, such as eps=8 / 255")
    chosen = attack(**{name: options.pop(name) for name in own.keys() & options.keys()})
    context = AttackContext.from_options(**options, counts_health=health is not None)
    result = chosen.search(model, x, y, context)
    if health is not None and result.health is not None:
        health.add(**result.health.counts)
    return result.images


@functools.cache
def _options_of_call(attack: type[Attack]) -> tuple[dict[str, inspect.Parameter], dict[str, inspect.Parameter]]:
    """The options of a call without an evaluation: the fields of the attack, and those of context and resources."""
    own, shared = parameters_of(attack), parameters_of(AttackContext, Resources)
    del shared["counts_health"], shared["resources"]
    if attack.norms:
        # The options eps and norm are the context's, because only the context's eps may be a tensor [B].
        del own["eps"], own["norm"]
    return own, {name: option for name, option in shared.items() if name not in own}


def as_function(name: str, attack: type[Attack], returns: str, **defaults: Any) -> Callable[..., Tensor]:
    """The function that runs an attack on one batch.

    ``inspect.signature`` and ``help`` show all of its options, which are the fields of the attack, of `AttackContext`
    and of `Resources`.

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

    own, shared = _options_of_call(attack)
    first = {"eps": shared["eps"].replace(default=inspect.Parameter.empty)} if "eps" in shared else {}
    options = {**inspect.signature(call, eval_str=True).parameters}
    del options["options"]
    health = inspect.Parameter("health", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=GradientHealth | None)
    # The radius comes first in the signature, because every call gives it.
    options |= first | own | shared | first | {"health": health}
    options |= {option: options[option].replace(default=value) for option, value in defaults.items()}
    of_shared = texts_of(AttackContext, Resources)
    texts = texts_of(attack) | {name: of_shared.get(name, "") for name in shared} | _TEXTS
    call.__name__ = call.__qualname__ = name
    call.__module__ = attack.__module__
    call.__signature__ = inspect.Signature(list(options.values()), return_annotation=Tensor)  # type: ignore[attr-defined]
    call.__annotations__ = {option: each.annotation for option, each in options.items()} | {"return": Tensor}
    call.__doc__ = docstring(
        inspect.cleandoc(attack.__doc__ or "").partition("\n\nArgs:")[0].partition("\n\nRaises:")[0],
        Args=[f"{option}: {texts.get(option, '')}" for option in options],
        Returns=[returns + _SHAPE],
        Raises=_ERRORS,
    )
    return call


_TEXTS = {
    "model": "images ``[B, ...]`` to logits ``[B, classes]``; a module is frozen for the attack, then restored.",
    "x": "images, floating point ``[B, ...]`` in [clip_min, clip_max].",
    "y": "true labels, int64 ``[B]``.",
    "health": "gets the counts of gradients and movement, if given.",
}
_SHAPE = (
    " Shape and dtype are those of x. Up to the rounding of this dtype, the images lie within the radius and within "
    "[clip_min, clip_max]."
)
_ERRORS = (
    "TypeError: x or y is no tensor, there is no such option, or a radius is missing.",
    "RuntimeError: the attack takes gradients, and the call stands within ``torch.inference_mode()``.",
    "ValueError: a shape, dtype, name, count or range that is not allowed; or a model that writes to its input.",
)
