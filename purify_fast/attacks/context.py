"""The settings that an attack gets from its caller: its task, and the means that it may use.

An evaluation makes an `AttackContext` from its own settings, and a call without an evaluation from its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .._validation import Count, NormName, check_types
from ..protocols import Classifier
from ..speed.graphs.step_graphs import StepGraphs
from .arguments import check_at_least_one
from .gradient_copy import GradientCopies
from .signatures import check_names

#: A radius in image units: one number, or one for each image, ``[B]``.
Radius = float | Tensor


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The means of an attack.

    Args:
        max_forward_batch: the most images in one forward pass; it changes no result. None: no limit.
        batch_size: the most images that an attack searches together, if it tries several targets or restarts of an
            image at once; None: 64, or the number of images if that is larger.
        counts_health: whether the attack counts gradients and movement.
        graphs: captures the steps of attacks on a CUDA device, if given; see `purify_fast.speed.StepGraphs`.
        copies: keeps the copies that give the gradients, so that the next attack uses them too, if given.

    Raises:
        ValueError: a count that is not allowed.
    """

    max_forward_batch: Count | None = None
    batch_size: Count | None = None
    counts_health: bool = False
    graphs: StepGraphs | None = None
    copies: GradientCopies | None = None

    def __post_init__(self) -> None:
        check_types(self)


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
        gradients_from: another model whose gradients the attack follows, while the attacked model judges every success.
            Only attacks with `Attack.follows_gradients` use it. None: the gradients of the attacked model.
        resources: what the attack may use.

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
    gradients_from: Classifier | None = None
    resources: Resources = Resources()

    def __post_init__(self) -> None:
        check_at_least_one(judge_draws=self.judge_draws)

    @classmethod
    def from_options(cls, **options: Any) -> AttackContext:
        """Make a context.

        Args:
            **options: fields of the context, and fields of its `Resources`.

        Raises:
            TypeError: an option that is a field of neither.
            ValueError: a name or a count that is not allowed.
        """
        own, shared = ({each.name for each in fields(kind)} for kind in (cls, Resources))
        check_names(cls.__name__, options, own | shared)
        resources = Resources(**{name: options.pop(name) for name in shared & options.keys()})
        return cls(**{"resources": resources} | options)

    def predictions(self, draws: int) -> int:
        """The number of predictions that take so many draws together."""
        return -(-draws // self.votes)

    def judges(self, draws: int) -> int:
        """The number of fresh predictions that judge an image, if a step averages so many draws."""
        return (self.judge_draws or draws) if self.draws_differ else 1
