"""Projected gradient descent (Madry et al., ICLR 2018), on the attack's loss upwards.

In the l1 ball PGD takes SLIDE's sparse steps (Tramer & Boneh, NeurIPS 2019) and projects onto ball and box at once
(Croce & Hein, ICML 2021): see `purify_fast.ops.pgd_step`. SLIDE moves a constant share of the coordinates, the same
way each, so that what it adds cannot gather where it is worth most; this implementation moves ever fewer.

Models map images [B, C, H, W] in [clip_min, clip_max] to logits [B, classes]. They are attacked in evaluation mode,
with gradients to the input only, and come back as they were (`purify_fast.attacks.frozen`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._validation import check_literal
from ..ops.pgd_step import per_sample, pgd_step
from ..protocols import Classifier
from ..speed.step_graphs import StepGraphs, begin_steps
from ..speed.step_loops import State
from .arguments import Norm, NormName, check_at_least_one, check_images, check_not_negative
from .ball import Ball, ball_around, normal_in_ball, sample_in_ball
from .base import AttackContext, BallAttack, cost_of_runs
from .draws import Objective, drawn_once_per_call
from .frozen_model import frozen
from .health import GradientHealth
from .losses import Loss, usable_loss
from .search import Search, noted, remembers, worst_of_restarts

#: The share of the coordinates that the first step in the l1 ball moves.
DENSITY = 0.1


@dataclass(frozen=True)
class Ascent:
    """One step of PGD as a function of tensors, which has no branch on what they hold: it can be captured.

    Args:
        objective: what is raised.
        norm: the ball's: "linf", "l2" or "l1".
        clip_min: the smallest value of a pixel.
        clip_max: the largest value of a pixel.
        density: of "l1", the share of the coordinates that move. None, where it changes from step to step: the
            gradient is returned in place of the new point, and `move` takes the step.

    The state: ``x``, the clean images, and ``point``, ``[B, ...]``; ``y``, labels; ``eps`` and ``alpha``, ``[B]``; what
    a `Search` remembers; without a density also ``gradient``, ``[B, ...]``.
    """

    objective: Objective
    norm: Norm
    clip_min: float
    clip_max: float
    density: float | None

    @property
    def model(self) -> Classifier:
        """What is attacked."""
        return self.objective.model

    def __call__(self, state: State) -> State:
        if remembers(state):
            found = self.objective.gradient(state["point"], state["y"])
            new, image = noted(self.objective, state, state["point"], found), found.image
        else:
            # as in training: nobody asks how good the points on the way are
            new, image = {}, self.objective.direction(state["point"], state["y"])
        gradient = image.to(state["x"].dtype)
        if self.density is None:
            return {**new, "gradient": gradient}
        return {**new, "point": self.move(state, gradient, self.density)}

    def move(self, state: State, gradient: Tensor, density: float) -> Tensor:
        """The next point.

        Args:
            state: the tensors of the step.
            gradient: at the point, of its shape and dtype.
            density: of "l1", the share of the coordinates that move.
        """
        bounds: dict[str, Any] = {"norm": self.norm, "lo": self.clip_min, "hi": self.clip_max}
        x, alpha, eps = state["x"], state["alpha"], state["eps"]
        return pgd_step(state["point"], gradient, x, alpha, eps, density=density, **bounds)


def ascend(
    objective: Objective,
    ball: Ball,
    state: State,
    *,
    steps: int,
    first: int = 0,
    falls: bool = False,
    density: float | None = None,
) -> State:
    """Take the steps of PGD.

    Args:
        objective: what is raised; its graphs capture the step.
        ball: the ball around each image.
        state: what `Ascent` begins with, but for eps; without ``alpha`` if it falls.
        steps: how many steps the whole attack has.
        first: the step to begin with, from 0.
        falls: whether the length of a step falls geometrically from eps to a hundredth of it.
        density: of "l1", the share of the coordinates that move; None: it falls.

    Returns:
        The state after the last step.
    """
    share = density_at(ball.norm, first, steps) if density is None else density
    changes = ball.norm == "l1" and density is None and steps - first > 1
    ascent = Ascent(objective, ball.norm, ball.clip_min, ball.clip_max, None if changes else share)
    state = {**state, "eps": ball.eps}
    if falls:
        state["alpha"] = ball.eps
    if changes:
        state["gradient"] = torch.zeros_like(state["x"])
    loop = begin_steps(objective.graphs, ascent, state, steps - first)
    for i in range(first, steps):
        if falls:
            loop.put(alpha=ball.eps * fall(i, steps))
        loop.take()
        if changes:
            point = ascent.move(loop.state, loop.state["gradient"], density_at(ball.norm, i, steps))
            loop.put(point=point)
    return loop.values()


def pgd(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 40,
    alpha: float | Tensor | None = None,
    norm: NormName = "linf",
    loss: Loss = "ce",
    eot_iter: int = 1,
    random_start: bool = True,
    start_std: float | None = None,
    keep_best: bool = False,
    density: float | None = None,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    max_forward_batch: int | None = None,
    health: GradientHealth | None = None,
    graphs: StepGraphs | None = None,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
) -> Tensor:
    """Projected gradient ascent on the attack loss.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: images, floating point ``[B, ...]`` in [clip_min, clip_max].
        y: true labels, int64 ``[B]``.
        eps: radius in image units, a number or ``[B]`` (customary on CIFAR-10: 8/255 for "linf", 0.5 for "l2", 12 for
            "l1").
        steps: gradient steps.
        alpha: length of a step in image units, a number or ``[B]``. None: it falls geometrically from ``eps`` to
            ``eps / 100``, which is stronger than a constant one (`make demo` has both on its base).
        norm: "linf", "l2" or "l1".
        loss: "ce", "margin" or "dlr".
        eot_iter: draws of a random model averaged per step: in one batch, or each in a call of its own where the model
            draws once per call.
        random_start: whether to begin at a random point of the ball and not at the image itself.
        start_std: standard deviation of a normal random start in image units, projected onto the ball; None for a start
            that is uniform in the ball.
        keep_best: whether to return, per image, the best iterate seen and not the last: misclassified in most draws,
            then of highest mean loss (one more forward pass, or two with several draws).
        density: of "l1" only: the share of the coordinates that a step moves, in (0, 1], at least one. None: the share
            falls geometrically from 0.1 to 0.001.
        seed: of the random start (Philox stream ATTACK_START).
        sample_ids: int64 ``[B]``; an image's random start depends on the seed and its id alone. None: 0 .. B - 1.
        max_forward_batch: images given to the model in one forward pass at most; exact, bounds the memory. (A defence
            that makes S samples of an image in N passes computes on S N times as many.) None: no limit.
        health: counts gradients and movement, if given.
        graphs: on a CUDA device, captures the step once and replays it, in this attack and later ones on the same
            module, see `purify_fast.speed.StepGraphs`. None: every step is launched operator by operator.
        clip_min: the smallest value of a pixel.
        clip_max: the largest value of a pixel.

    Returns:
        Adversarial images: shape and dtype of x, within eps of x (in half precision: up to its rounding) and within
        [clip_min, clip_max].

    Raises:
        TypeError: x or y is no tensor.
        RuntimeError: it is called within ``torch.inference_mode()``.
        ValueError: a wrong shape, dtype, name or count, or a negative eps or alpha; or a model
            that writes to its input.
    """
    check_images(x, y, clip_min, clip_max)
    ball = ball_around(x, eps, norm, clip_min, clip_max)
    check_literal("loss", loss, Loss)
    check_at_least_one(steps=steps, eot_iter=eot_iter, max_forward_batch=max_forward_batch)
    check_not_negative(alpha=alpha, start_std=start_std)
    if x.shape[0] == 0:
        return x.clone()
    x = x.detach().clone()
    constant = None if alpha is None else per_sample("alpha", alpha, x)
    with frozen(model):
        apart = drawn_once_per_call(model, x, eot_iter, max_forward_batch)
        objective = Objective(model, loss, eot_iter, max_forward_batch, graphs, apart=apart)
        point = x
        if random_start and start_std is not None:
            point = normal_in_ball(x, ball, start_std, seed=seed, sample_ids=sample_ids)
        elif random_start:
            point = sample_in_ball(x, ball, seed=seed, sample_ids=sample_ids)
        search = Search(objective, point, y, keep_best=keep_best, health=health)
        begin: State = {"point": point, "x": x, "y": y, **search.memory()}
        if constant is not None:
            begin["alpha"] = constant
        last = ascend(objective, ball, begin, steps=steps, falls=constant is None, density=density)
        search.recall(last, steps)
        search.see_move(x, last["point"])
        return search.result(last["point"])


def fall(i: int, steps: int) -> float:
    """What a step's length is multiplied with: from 1 at the first step to a hundredth at the last.

    Args:
        i: the step, from 0.
        steps: of how many.
    """
    return 100.0 ** (-i / max(1, steps - 1))


def density_at(norm: str, i: int, steps: int) -> float:
    """The share of the coordinates that an l1 step moves; for other norms a constant, which is not used.

    Args:
        norm: the ball's.
        i: the step, from 0.
        steps: of how many.
    """
    # a compiled step would be compiled again for every new number
    return DENSITY * fall(i, steps) if norm == "l1" else DENSITY


@dataclass(frozen=True, kw_only=True)
class PGD(BallAttack):
    """Projected gradient descent that keeps the best point, as a row of an evaluation.

    Args:
        loss: "ce", "margin" or "dlr", which below 3 classes becomes "margin".
        steps: gradient steps; None: the report's.
        alpha: length of a step in image units; None: it falls geometrically from eps to eps / 100.
        random_start: whether the first run begins at a random point of the ball; every further one does.
        restarts: runs, of which each image keeps its worst.
        eot_iter: draws of a random model averaged per step; None: the report's.
        eps: radius of another ball than the report's, in image units; None: the report's.
        norm: norm of another ball than the report's: "linf", "l2" or "l1"; None: the report's. It needs an eps.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "pgd"

    loss: Loss = "ce"
    steps: int | None = None
    alpha: float | None = None
    random_start: bool = True
    restarts: int = 1
    eot_iter: int | None = None
    eps: float | None = None
    norm: Norm | None = None

    def __post_init__(self) -> None:
        check_literal("loss", self.loss, Loss)
        check_at_least_one(steps=self.steps, restarts=self.restarts, eot_iter=self.eot_iter)
        check_not_negative(alpha=self.alpha)
        self.check_ball()

    def name(self, context: AttackContext) -> str:
        name = f"{self.kind.upper()}-{self.steps or context.steps} {usable_loss(self.loss, context.num_classes)}"
        return name + (f" x{self.restarts}" if self.restarts > 1 else "")

    def cost(self, context: AttackContext) -> int:
        return cost_of_runs(self.steps or context.steps, self.draws(context), self.restarts)

    def settings(self, context: AttackContext) -> dict[str, Any]:
        own = {"loss": usable_loss(self.loss, context.num_classes), "steps": self.steps or context.steps}
        return super().settings(context) | own

    def revision(self) -> str:
        return "3"

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        norm, eps = self.ball(context)
        draws = self.draws(context)

        def attack(run: int) -> Tensor:
            return pgd(
                target,
                x,
                y,
                eps=eps,
                norm=norm,
                steps=self.steps or context.steps,
                alpha=self.alpha,
                loss=usable_loss(self.loss, context.num_classes),
                random_start=self.random_start or run > 0,
                keep_best=True,
                eot_iter=draws,
                max_forward_batch=context.max_forward_batch,
                seed=context.seed + run,
                sample_ids=context.sample_ids,
                health=context.health,
                graphs=context.graphs,
            )

        return worst_of_restarts(attack, target, y, restarts=self.restarts, eot_iter=draws)
