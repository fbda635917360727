"""The attacks of a training loop as functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._validation import Count, NormName, check_literal
from ..protocols import Classifier
from ..speed.graphs.step_loop import State, eager_steps
from .attacked_model import check_labels
from .base import AttackContext, Ball, Radius, chosen_seed, keeping, untraced
from .objective import LOSSES, GradientHealth, Loss, LossFunction, Objective
from .pgd import PGD


@dataclass(frozen=True, kw_only=True)
class LeavingPGD(PGD):
    """PGD that takes no further steps for an image once all draws of one step have misclassified the image.

    The draws of a step are fresh, so twenty wrong draws are twenty independent wrong predictions.

    Args:
        look_every: the number of steps between two checks for misclassified images.
    """

    code_version: ClassVar[str] = "4, leaving 1"

    look_every: Count = 20

    def __post_init__(self) -> None:
        if not self.keep_best:
            raise ValueError("keep_best must be True, because LeavingPGD returns the best points, got False")
        super().__post_init__()

    def climb(
        self, objective: Objective, ball: Ball, state: State, health: GradientHealth | None, *, steps: int, part: range
    ) -> State:
        begin = full = state
        # For each tensor, the dimension that has an entry per image. A tensor without dimensions belongs to all images.
        dims = {name: int(name == "best_score") for name, value in begin.items() if value.dim()}
        index = torch.arange(len(begin["y"]), device=begin["y"].device)
        with keeping(lambda: full["best"]):
            for first in part[:: self.look_every]:
                now = range(first, min(first + self.look_every, part.stop))
                with eager_steps():
                    # The compiler would compile the step again for each number of images.
                    state = super().climb(objective, ball.take(index), state, health, steps=steps, part=now)
                # Drop the values that `PGD.climb` has added, such as the radii. The next call adds them again.
                state = {name: state[name] for name in begin}
                full = state | {name: full[name].index_copy(dim, index, state[name]) for name, dim in dims.items()}
                stay = (state["best_score"][0] < 1).nonzero()[:, 0]
                if health is not None:
                    # `Search.result` counts a gradient for every image and step. Subtract the remaining gradients of
                    # the images that are removed here.
                    health.add(gradients=(len(stay) - len(index)) * (steps - now.stop))
                if not len(stay):
                    break
                index = index[stay]
                state |= {name: state[name].index_select(dim, stay) for name, dim in dims.items()}
        return full


# -- the attacks of a training loop as functions -----------------------------------------------------------------------

#: The mode of a model during an attack: evaluation mode, or the mode in which the model is.
Mode = Literal["eval", "keep"]


def goal(
    x: Tensor, y: Tensor | None, loss: str | LossFunction = "ce", targeted: Tensor | None = None
) -> tuple[Tensor, LossFunction | None]:
    """Return the labels or target classes of a direct call, and the function that replaces the attack's loss, or None.

    Args:
        x: images ``[B, ...]``.
        y: labels, int64 ``[B]``; with a function as loss, what the function gets, or None.
        loss: the name of a loss, or a function.
        targeted: target classes, int64 ``[B]``. The loss of these classes is then lowered.

    Raises:
        TypeError: y is missing, or ``targeted`` is no tensor.
        ValueError: ``targeted`` has a wrong shape or dtype, a class below 0, or a loss that takes no targets.
    """
    if targeted is not None:
        if loss not in LOSSES:
            raise ValueError(f"targeted needs a loss among {', '.join(LOSSES)}, got {loss!r}")
        if not isinstance(targeted, Tensor):
            raise TypeError(f"targeted must be a tensor of classes, int64 [B], got {targeted!r}")
        if targeted.shape != (len(x),) or targeted.dtype != torch.int64:
            raise ValueError(f"targeted must be int64 [B] = [{len(x)}], got {targeted.dtype} {list(targeted.shape)}")
        check_labels("targeted", targeted)
        return targeted, None
    if callable(loss):
        if y is None:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device), lambda logits, _: loss(logits, None)
        return y, loss
    if y is None:
        raise TypeError("y is missing: give labels, int64 [B], or a function as loss, or targeted")
    return y, None


@untraced
def pgd(
    model: Classifier,
    x: Tensor,
    y: Tensor | None,
    eps: Radius,
    *,
    norm: NormName = "linf",
    steps: int = 40,
    alpha: float | Tensor | None = None,
    loss: Loss | LossFunction = "ce",
    targeted: Tensor | None = None,
    random_start: bool = True,
    start_std: float | None = None,
    eot_iter: int = 1,
    keep_best: bool = False,
    stop_when_fallen: bool = False,
    mode: Mode = "eval",
    clip_min: float | Tensor = 0.0,
    clip_max: float | Tensor = 1.0,
    seed: int | torch.Generator | None = None,
) -> Tensor:
    """Run `PGD` on a batch.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]``; a module is in evaluation mode during the attack.
        x: images, floating point ``[B, ...]`` in [clip_min, clip_max].
        y: true labels, int64 ``[B]``. With a function as loss, y is what the function gets, ``[B, ...]`` or None.
        eps: radius of the ball in image units: a number, ``[B]``, or for PGD and FGSM in linf a tensor that can be
            broadcast over the images, such as ``[C, 1, 1]`` for normalized images.
        norm: norm of the ball: "linf", "l2" or "l1".
        steps: number of gradient steps.
        alpha: length of a step in image units, a number or a tensor like eps. With None, step i of n (from 0) has the
            length eps * 100 ** (-i / (n - 1)): it falls from eps to eps / 100.
        loss: the loss that is maximized: "ce", "margin", "scaled_margin", "dlr" (with at least 3 classes), or a
            function ``(logits, y) -> [B]``.
        targeted: target classes, int64 ``[B]``: the attack lowers the loss of these classes, and reads no y.
        random_start: whether the attack begins at a random point of the ball instead of the image itself.
        start_std: standard deviation, in image units, of a normal random start that is projected onto the ball. With
            None, the start is uniform in the ball.
        eot_iter: number of draws of a random model over which each gradient is averaged.
        keep_best: whether the best point of each image is returned (misclassified by the most draws, then of the
            highest loss) instead of the last. This takes one more forward pass, or two with several draws.
        stop_when_fallen: whether an image takes no further steps after a step that misclassifies it. Its best point is
            then returned.
        mode: "eval", or "keep", which leaves the model in its mode: BatchNorms in training mode then take the
            statistics of the batch, and update their averages in each step.
        clip_min: the smallest value of a pixel, a number or a tensor that can be broadcast over the images.
        clip_max: the largest value of a pixel, like clip_min.
        seed: seed of the random start, or a generator that draws it; None: torch's generator of the CPU draws it.

    Returns:
        Per image the last point, or the best point with ``keep_best`` or ``stop_when_fallen``. Shape and dtype are
        those of x. Up to the rounding of this dtype, the images lie within the radius and within [clip_min, clip_max].

    Raises:
        TypeError: x or y is no tensor, y or the radius is missing, or the model returns no logits.
        RuntimeError: an attack with gradients is called within ``torch.inference_mode()``.
        ValueError: a shape, dtype, name, count or range that is not allowed, also of the model's output; or a model
            that writes to its input.
    """
    if mode not in ("eval", "keep"):
        check_literal("mode", mode, Mode)
    y, function = goal(x, y, loss, targeted)
    options: dict[str, Any] = {"loss": "ce" if callable(loss) else loss, "steps": steps, "alpha": alpha}
    options |= {"random_start": random_start, "start_std": start_std, "eot_iter": eot_iter}
    if stop_when_fallen and (function is not None or targeted is not None):
        raise ValueError("stop_when_fallen must be False with a function as loss or with targeted, got True")
    attack = LeavingPGD(look_every=1, **options) if stop_when_fallen else PGD(keep_best=keep_best, **options)
    context = AttackContext(
        eps=eps,
        norm=norm,
        clip_min=clip_min,
        clip_max=clip_max,
        seed=chosen_seed(seed),
        loss_function=function,
        toward=targeted is not None,
        keep_mode=mode == "keep",
    )
    return attack.run(model, x, y, context).images


@untraced
def fgsm(
    model: Classifier,
    x: Tensor,
    y: Tensor | None,
    eps: Radius,
    *,
    norm: NormName = "linf",
    loss: Loss | LossFunction = "ce",
    targeted: Tensor | None = None,
    eot_iter: int = 1,
    mode: Mode = "eval",
    clip_min: float | Tensor = 0.0,
    clip_max: float | Tensor = 1.0,
) -> Tensor:
    """Run `FGSM`, one step of length eps from each image, and return the points after the step.

    Arguments, result and errors are those of `purify_fast.attacks.pgd`. FGSM draws no random numbers.
    """
    how: dict[str, Any] = {"loss": loss, "targeted": targeted, "eot_iter": eot_iter, "mode": mode, "seed": 0}
    how |= {"norm": norm, "clip_min": clip_min, "clip_max": clip_max}
    return pgd(model, x, y, eps, steps=1, random_start=False, **how)
