"""The settings that an attack gets from its caller."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from .._classifier import Classifier
from .._validation import GradientPrecision, NormName, check_counts
from ..speed.graphs.step_loop import CapturesSteps

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
    seed: int | Tensor = 0
    sample_ids: Tensor | None = None
    loss_function: LossFunction | None = None
    toward: bool = False
    keep_mode: bool = False
    max_forward_batch: int | None = None
    graphs: CapturesSteps | None = None
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
