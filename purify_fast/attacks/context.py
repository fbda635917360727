"""The settings that an attack gets from its caller."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor

from .._tensors import per_sample
from .._validation import GradientPrecision, Norm, NormName, check_counts, read_norm
from ..ops.pgd_step import NORMS, clamped, per_pixel, pgd_step
from ..ops.philox import DISTRIBUTIONS, OP as DRAW, Stream, philox, philox_key
from ..protocols import Classifier
from .arguments import can_read, check_eps, check_tensor, largest_distance

#: A radius in image units: a number for all images, or ``[B]``, a number for each image. In "linf" also a tensor that
#: can be broadcast over the images, such as ``[C, 1, 1]`` for normalized images.
Radius = float | Tensor
#: A function of logits ``[B, classes]`` and of the caller's y that returns the loss of each image, ``[B]``.
LossFunction: TypeAlias = Callable[[Tensor, Any], Tensor]


def drawn_seed(generator: torch.Generator | None = None) -> int:
    """Draw a seed from a generator, or from torch's generator of the CPU."""
    device = "cpu" if generator is None else generator.device
    # A number is read from a tensor of the CPU by NumPy, because it waits for no device.
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device).cpu().numpy())


def chosen_seed(seed: int | Tensor | torch.Generator | None) -> int | Tensor:
    """Return the seed of a direct call: the given seed, or a seed that a generator draws."""
    return drawn_seed(seed) if seed is None or isinstance(seed, torch.Generator) else seed


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
