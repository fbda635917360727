"""The base classes of attacks, which are frozen dataclasses; an option None takes its value from an `AttackContext`."""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from .._library import outside_graphs
from .._tensors import per_sample
from .._validation import Count, GradientPrecision, Norm, NormName, check_counts, check_types, read_norm
from ..ops.pgd_step import NORMS, clamped, per_pixel, pgd_step
from ..ops.philox import DISTRIBUTIONS, OP as DRAW, Stream, philox, philox_key
from ..protocols import Classifier
from ..speed.reading import reading
from .attacked_model import can_read, check_eps, check_images, check_tensor, first_output, frozen, largest_distance
from .objective import GradientHealth, LossFunction, Objective, better_of, usable_loss

#: A radius in image units: a number for all images, or ``[B]``, a number for each image. In "linf" also a tensor that
#: can be broadcast over the images, such as ``[C, 1, 1]`` for normalized images.
Radius = float | Tensor


def chosen_seed(seed: int | Tensor | torch.Generator | None) -> int | Tensor:
    """Return the seed of a direct call: the given seed, or one that a generator draws; None: torch's of the CPU."""
    if seed is not None and not isinstance(seed, torch.Generator):
        return seed
    device = "cpu" if seed is None else seed.device
    # A number is read from a tensor of the CPU by NumPy, because it waits for no device.
    return int(torch.randint(2**63 - 1, (), generator=seed, device=device).cpu().numpy())


class TimeIsOver(BaseException):
    """The time of an evaluation is over. A handler of a model's errors, ``except Exception``, does not catch it.

    ``points`` are the best points that the attack had so far, ``[B, C, H, W]``, or None.
    """

    points: Tensor | None = None


@contextlib.contextmanager
def keeping(points: Callable[[], Tensor]) -> Iterator[None]:
    """A block of an attack; if the time is over in it, the present ``points`` are its result."""
    try:
        yield
    except TimeIsOver as over:
        over.points = points()
        raise


@dataclass(frozen=True, kw_only=True)
class AttackContext:
    """The settings of an attack besides its own options.

    Args:
        eps: radius of the ball in image units, see `Radius`; usual on CIFAR-10: linf 8/255, l2 0.5, l1 12.
        norm: norm of the ball: "linf", "l2" or "l1".
        clip_min: the smallest value of a pixel.
        clip_max: the largest value of a pixel.
        num_classes: number of the model's classes; 0 if it is not known. With 0, "margin" replaces no other loss.
        steps: number of steps of an attack whose own ``steps`` is None.
        eot_iter: number of draws averaged per step, for an attack whose own ``eot_iter`` is None.
        draws_differ: whether two predictions of the same image may differ. If not, every attack takes one draw.
        shares_draws: whether predictions of a call have a random part in common; every draw then takes a separate call.
        seed: seed of all random numbers; in a captured step a tensor, int64 ``[1]``.
        sample_ids: int64 ``[B]``, the indices of the images in their data set. The random start of an image depends
            only on the seed and its index. None: 0 .. B - 1.
        loss_function: a loss that replaces the attack's own in PGD, FGSM, Auto-PGD and StAdv.
        toward: whether y are target classes: the attack then lowers the loss of these classes.
        keep_mode: whether PGD and FGSM leave the model in its mode, so that BatchNorms in training mode take the
            statistics of the batch and update their averages.
        max_forward_batch: the largest number of images in one forward pass, which changes no result. None: no limit.
        graphs: captures the steps of attacks as CUDA graphs, see `purify_fast.speed.StepGraphs`; None: no captures.
        counts_health: whether the attack counts faulty gradients and unmoved images.

    Raises:
        ValueError: a count that is not allowed.
    """

    #: The frozen copies of an evaluation; other attacks have none.
    copies: ClassVar[Any] = None

    eps: Radius = 0.0
    norm: NormName = "linf"
    clip_min: float | Tensor = 0.0
    clip_max: float | Tensor = 1.0
    num_classes: int = 0
    steps: int = 100
    eot_iter: int = 1
    draws_differ: bool = True
    shares_draws: bool = False
    seed: int | Tensor = 0
    sample_ids: Tensor | None = None
    loss_function: LossFunction | None = None
    toward: bool = False
    keep_mode: bool = False
    max_forward_batch: int | None = None
    graphs: Any = None
    counts_health: bool = False

    def __post_init__(self) -> None:
        if self.max_forward_batch is not None:
            check_counts(max_forward_batch=self.max_forward_batch)

    def source(self, model: Classifier, x: Tensor, precision: GradientPrecision) -> Classifier:
        """Return the model from which an attack takes its gradients: with "bfloat16" a copy, otherwise ``model``."""
        if precision != "bfloat16" or not len(x):
            return model
        # Other attacks need none of what makes copies.
        from .gradient_copy import Copies

        return Copies(x).copy_for(model, precision)


# -- ball --------------------------------------------------------------------------------------------------------------

UNIFORM = DISTRIBUTIONS.index("uniform")


@dataclass(frozen=True)
class Ball:
    """A ball of radius ``eps``, ``[B]`` or of the images' shape, around each image, within [clip_min, clip_max]."""

    #: Not compared: a captured step takes the `inputs`, so it can be replayed for every radius and every range.
    eps: Tensor = field(compare=False)
    norm: Norm = "linf"
    clip_min: Any = 0.0
    clip_max: Any = 1.0

    @property
    def bounds(self) -> dict[str, Any]:
        """The norm and the box, as the arguments of `purify_fast.ops.pgd_step` and `apgd_step`."""
        return {"norm": self.norm, "lo": self.clip_min, "hi": self.clip_max}

    def take(self, index: Tensor | slice) -> Ball:
        """Return the balls of some of the images."""
        return replace(self, eps=self.eps[index])


def ball_around(
    x: Tensor, eps: float | Tensor, norm: str = "linf", clip_min: float | Tensor = 0.0, clip_max: float | Tensor = 1.0
) -> Ball:
    """Check the radius ``eps``, see `Radius`, and make the balls around images."""
    kind = cast(Norm, norm) if norm in NORMS else read_norm(norm)
    if isinstance(clip_min, Tensor) or isinstance(clip_max, Tensor):
        return Ball(_checked_radii(x, eps, kind, clip_max - clip_min), kind, clip_min, clip_max)
    if isinstance(eps, Tensor):
        return Ball(_checked_radii(x, eps, kind, max(1.0, clip_max - clip_min)), kind, clip_min, clip_max)
    # Most radii pass this test, which takes no time.
    if type(eps) is not float or not 0 <= eps <= max(1.0, clip_max - clip_min):
        check_eps(eps, kind, max(1.0, clip_max - clip_min), pixels=x.shape[1:].numel())
    return Ball(per_sample("eps", eps, x), kind, clip_min, clip_max)


def _checked_radii(x: Tensor, eps: float | Tensor, norm: Norm, width: float | Tensor) -> Tensor:
    """Return radii for a radius or a range that is a tensor. Their values are checked where `can_read` allows it."""
    if not isinstance(eps, Tensor):
        check_eps(eps, None)
    radii = per_pixel("eps", eps, x).detach()
    if can_read(radii):
        widths = torch.as_tensor(width).clamp_min(0.0)
        # A radius for each image is compared with the widest range of a pixel.
        most = largest_distance(norm, x.shape[1:].numel()) * (widths if radii.dim() > 1 else widths.max())
        check_tensor("eps", radii, most)
    return radii


def projected(x: Tensor, point: Tensor, ball: Ball) -> Tensor:
    """Project points onto the balls around images x and then onto the box; in l1, onto their intersection."""
    # A step of length 0 only projects the point.
    return pgd_step(point, torch.zeros_like(x), x, 0.0, ball.eps, **ball.bounds)


def normal_in_ball(
    x: Tensor, ball: Ball, std: float, *, seed: int | Tensor = 0, sample_ids: Tensor | None = None
) -> Tensor:
    """Draw a point from a normal distribution around each image, and project it onto the ball and the box."""
    ids = torch.arange(x.shape[0], device=x.device) if sample_ids is None else sample_ids
    key, size = philox_key(seed, x.device), x.shape[1:].numel()
    noise = philox(key, ids, size, stream=Stream.ATTACK_START, distribution="normal")
    return projected(x, (x + std * noise.view_as(x)).to(x.dtype), ball)


def sample_in_ball(x: Tensor, ball: Ball, *, seed: int | Tensor = 0, sample_ids: Tensor | None = None) -> Tensor:
    """Draw a point uniformly from the ball around each image, and clamp it to the box."""
    ids = torch.arange(x.shape[0], device=x.device) if sample_ids is None else sample_ids
    key, size, stream = philox_key(seed, x.device), x.shape[1:].numel(), Stream.ATTACK_START
    if ball.norm == "linf":
        # `philox` without its checks.
        noise = DRAW(key, ids, size, *(int(stream), UNIFORM, 1, 0)).view(x.shape)
    else:
        draw = partial(philox, key, ids, stream=stream)
        if ball.norm == "l2":
            noise = draw(size, distribution="normal")[:, 0]
        else:
            # Draw from Laplace's distribution by the inverse of its distribution function. The uniform numbers are
            # multiples of 2^-24. They are shifted by 2^-25, so that no result is 0 or infinite.
            middles = 2 * draw(size)[:, 0] - (1 - 2**-24)
            noise = -middles.sign() * torch.log1p(-middles.abs())
        shrink = draw(1, first_draw=1)[:, 0] ** (1 / size)
        noise = noise / noise.norm(p=2 if ball.norm == "l2" else 1, dim=1, keepdim=True) * shrink
    radii = ball.eps if ball.eps.dim() > 1 else ball.eps.view(-1, *[1] * (x.dim() - 1))
    if ball.norm != "linf":
        point = x + noise.view_as(x) * radii
    elif x.dtype == noise.dtype == radii.dtype:
        point = torch.addcmul(x, noise, radii, value=2).sub_(radii)
    else:
        point = x + (2 * noise - 1) * radii
    if isinstance(ball.clip_min, Tensor) or isinstance(ball.clip_max, Tensor):
        return clamped(point, ball.clip_min, ball.clip_max).to(x.dtype)
    return point.clamp_(ball.clip_min, ball.clip_max).to(x.dtype)


# -- the base classes --------------------------------------------------------------------------------------------------

#: For a direct call: torch.compile ends its graph before the call, and compiles what the call runs. It cannot trace how
#: the call makes an attack and its context.
untraced = functools.partial(outside_graphs, recursive=False)


class ThreatModel(NamedTuple):
    """The norm and the radius of the set of changed images that an attack may return."""

    #: "linf", "l2" or "l1"; "flow" for an attack that shifts pixels instead of changing their values.
    norm: str
    #: The radius in image units. For "flow": the largest shift along each axis, in units of half the image.
    eps: float


@dataclass(frozen=True)
class AttackResult:
    """The outcome of an attack on a batch of images.

    Args:
        images: adversarial images, with the shape and dtype of the clean images.
        health: the counts of faulty gradients and unmoved images; None if nothing was counted.
        warnings: warnings for the reader of the result.
        gave_up: number of images that survived only because every search gave up without any progress towards a
            decision boundary; a number or a tensor of shape []. Their survival says nothing about the defence.
    """

    images: Tensor
    health: GradientHealth | None = None
    warnings: list[str] = field(default_factory=list)
    gave_up: int | Tensor = 0


class Resolved(NamedTuple):
    """The values with which an attack runs, after `Attack.resolved_for` has replaced every option that is None."""

    steps: int
    eot_iter: int
    loss: Any
    #: The number of wrong classes that are targeted, each in its own run. Auto-PGD has None here if its loss is not
    #: targeted. Other attacks without targets ignore the number.
    n_target_classes: int | None


@dataclass(frozen=True, kw_only=True)
class Attack(abc.ABC):
    """The base class of attacks; every attack is a frozen dataclass of its options.

    A subclass with `norms` searches a ball; its ``eps`` and ``norm`` override the evaluation's. A setting that is not
    allowed raises ValueError, and the message names it.

    Args:
        eot_iter: number of draws of a random model that each step averages. None takes the evaluation's number, or 1.
    """

    #: The attack's name in saved results: "pgd", "apgd", ...
    kind: ClassVar[str]

    #: The version of the attack's code, which `revision` returns. It must be raised whenever a change makes the attack
    #: find other images with the same settings.
    code_version: ClassVar[str | None] = None

    #: The norms of the balls that the attack can search. Without a ball, it is empty, and `threat_model` overridden.
    norms: ClassVar[tuple[str, ...]] = ()

    #: True if `search` can take its gradients from the model `AttackContext.gradients_from`.
    follows_gradients: ClassVar[bool] = False

    #: False for an attack without gradients: images that fall only to such attacks are a sign that gradients mislead.
    uses_gradients: ClassVar[bool] = True

    #: The number of steps if the option ``steps`` is None. If both are None, the context gives the number.
    usual_steps: ClassVar[int | None] = None

    eot_iter: Count | None = None

    def __new__(cls, *model: Any, **settings: Any) -> Attack:
        """Refuse the order of torchattacks, ``PGD(model, eps=8 / 255)``."""
        if model:
            call = f"{cls.__name__}(steps=10)(model, x, y, eps=8 / 255)"
            raise TypeError(f"{cls.__name__} takes its settings by name, and a model only when it is called: {call}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.norms:
            own: Any = self
            norm = None if own.norm is None else read_norm(own.norm, self.norms)
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
        """Return the norm and the radius of the ball; the context gives those that the attack does not set."""
        norm, eps = self._norm_and_radius(context)
        return ThreatModel(norm, float(eps))

    def ball(self, x: Tensor, y: Tensor, context: AttackContext) -> Ball:
        """Check the images, and make the balls of `threat_model` around them.

        Raises:
            TypeError: x or y is no tensor.
            ValueError: images, labels, a norm or a radius that are not allowed.
        """
        check_images(x, y, context.clip_min, context.clip_max, labels=context.loss_function is None)
        norm, eps = self._norm_and_radius(context)
        return ball_around(x, eps, norm, context.clip_min, context.clip_max)

    def _norm_and_radius(self, context: AttackContext) -> tuple[Norm, Any]:
        """Return the norm and the radius. The context gives a norm or radius that the attack does not set."""
        own: Any = self
        norm, eps = own.norm or context.norm, context.eps if own.eps is None else own.eps
        return cast(Norm, norm) if norm in self.norms else read_norm(norm, self.norms), eps

    def draws(self, context: AttackContext) -> int:
        """The number of predictions that a step averages; 1 if the model predicts the same every time."""
        return (self.eot_iter or context.eot_iter) if context.draws_differ else 1

    def resolved_for(self, context: AttackContext) -> Resolved:
        """Replace each option that is None, and choose "margin" if the model has too few classes for the loss."""
        steps = getattr(self, "steps", None) or self.usual_steps or context.steps
        loss: Any = getattr(self, "loss", "ce")
        targets = getattr(self, "n_target_classes", None) or context.num_classes
        loss = usable_loss(loss, context.num_classes) if context.num_classes else loss
        return Resolved(steps, self.draws(context), loss, min(targets, context.num_classes - 1))

    def may_end_early(self, context: AttackContext) -> bool:
        """Return True if a search may stop before its last step because a success is out of reach."""
        return False

    @abc.abstractmethod
    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        """Search for adversarial images of a batch of images.

        Args:
            target: the model that the method `target` has returned; images to logits. Modes and gradient flags of an
                ``nn.Module`` are restored.
            x: images ``[B, C, H, W]`` in [0, 1].
            y: labels, int64 ``[B]``.
            context: the settings besides the attack's own options.

        Returns:
            The adversarial images, and the counts of the attack.
        """

    @untraced
    def __call__(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        eps: Radius | None = None,
        *,
        norm: NormName = "linf",
        clip_min: float | Tensor = 0.0,
        clip_max: float | Tensor = 1.0,
        seed: int | torch.Generator | None = None,
    ) -> Tensor:
        """Attack a batch without an evaluation: ``PGD(steps=3)(model, x, y, eps=8 / 255)``.

        Args:
            model: images ``[B, ...]`` to logits ``[B, classes]``.
            x: images, floating point ``[B, ...]`` in [clip_min, clip_max].
            y: true labels, int64 ``[B]``.
            eps: radius of the ball in image units, see `AttackContext`; None if the attack itself has a radius.
            norm: norm of the ball, "linf", "l2" or "l1", if the attack itself has no norm.
            clip_min: the smallest value of a pixel.
            clip_max: the largest value of a pixel.
            seed: seed of all random numbers, or a generator that draws it; None: torch's generator of the CPU draws it.

        Returns:
            The adversarial images, with shape and dtype of x.

        Raises:
            TypeError: an output of the model without logits.
            ValueError: a missing radius; images, labels, options or logits that are not allowed.
        """
        radius, number = 0.0 if eps is None else eps, chosen_seed(seed)
        context = AttackContext(eps=radius, norm=norm, clip_min=clip_min, clip_max=clip_max, seed=number)
        if eps is None and self.threat_model(context).eps == 0:
            raise ValueError(f"eps must be given: call {type(self).__name__}(...)(model, x, y, eps=8 / 255)")
        return self.run(model, x, y, context).images

    @untraced
    def run(self, model: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        """Attack a batch without an evaluation, with all settings of a context, and return also what was counted.

        Steps on a frozen copy are captured in the copy's graphs, by one attack at a time. On another stream than the
        default one, nothing is captured, because replays must not overlap. A step with a user's loss is not captured
        either: what the loss reads would be frozen.
        """
        # `DistributedDataParallel` would exchange buffers in each forward pass.
        model = self.target(model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model)
        ours = context.loss_function is None
        # With a user's loss, any labels are allowed.
        token = first_output.set(("targeted" if context.toward else "y", y if ours else y[:0]))
        try:
            with reading(model) as graphs:
                free = graphs is not None and context.graphs is None and ours and graphs.free_for(model, x.device)
                if not free:
                    return self.search(model, x, y, context)
                try:
                    captured = replace(context, graphs=graphs)
                    return graphs.retry_without_graphs(lambda: self.search(model, x, y, captured), x.device)
                finally:
                    graphs.lock.release()
        finally:
            first_output.reset(token)

    def revision(self) -> str | None:
        """The version of the attack's code. Cached results need the same version; with None, results are not cached."""
        return self.code_version

    def identity(self) -> list[str]:
        """Return the module and the name of the attack's class, because two classes may have the same revision."""
        return [type(self).__module__, type(self).__qualname__]

    def target(self, model: Classifier) -> Classifier:
        """The model whose outputs and gradients the attack uses in order to fool ``model``; by default ``model``."""
        return model

    def settings(self, context: AttackContext) -> dict[str, Any]:
        """The options as plain values; the context's value replaces an option that is None."""
        options = asdict(self)
        resolved = {name: value for name, value in self.resolved_for(context)._asdict().items() if name in options}
        return options | resolved | self.threat_model(context)._asdict()


@dataclass(frozen=True, kw_only=True)
class InBall(Attack):
    """The base class of attacks in a ball.

    Args:
        eps: radius of the ball in image units. None takes the evaluation's radius.
        norm: norm of the ball, "linf", "l2" or "l1"; a norm needs an eps beside it. None takes the evaluation's norm.
    """

    norms: ClassVar[tuple[str, ...]] = get_args(Norm)

    eps: float | None = None
    norm: NormName | None = None


def times(restarts: int) -> str:
    """Return the end of an attack's name, which gives the number of restarts if there are several."""
    return f" x{restarts}" if restarts > 1 else ""


# -- attacks that follow the gradient of the model itself -------------------------------------------------------------


def worst_of_runs(
    attack: Any,
    one_run: Callable[[Objective, int, GradientHealth | None], Tensor],
    batch: tuple[Classifier, Tensor, Tensor],
    context: AttackContext,
) -> AttackResult:
    """Make all runs of an attack, and return each image's point with the most wrong draws and the largest margin.

    A prediction with NaN is a misclassification with an infinite margin. So no run replaces a success by a failure.
    """
    model, x, y = batch
    health, most = GradientHealth() if context.counts_health else None, context.max_forward_batch
    _, draws, loss, _ = attack.resolved_for(context)
    precision: GradientPrecision = "float32" if context.keep_mode else getattr(attack, "precision", "float32")
    with torch.enable_grad(), frozen(model, keep_mode=context.keep_mode):
        apart = False
        if draws > 1:
            from .shared_draws import drawn_once_per_call

            apart = context.shares_draws or drawn_once_per_call(model, x, draws, most)
        source = context.source(model, x, precision) if context.copies is not None or precision == "bfloat16" else model
        loss = context.loss_function or loss
        objective = Objective(source, loss, draws, most, graphs=context.graphs, apart=apart, toward=context.toward)
        with frozen(source) if source is not model else contextlib.nullcontext():
            best = one_run(objective, 0, health)
            if attack.restarts == 1:
                return AttackResult(best, health)
            # Each forward pass contains at most one draw of every image.
            judge = Objective(model, "margin", draws, min(max(1, len(y)), most or len(y) + 1), apart=apart)

            def score(points: Tensor) -> Tensor:
                wrong, margins = judge.score(points, y)
                return torch.stack([wrong, margins.masked_fill(margins.isnan(), torch.inf)])

            best_score = score(best)
            with keeping(lambda: best):
                for number in range(1, attack.restarts):
                    points = one_run(objective, number, health)
                    best, best_score = better_of(best, best_score, points, score(points))
            return AttackResult(best, health)
