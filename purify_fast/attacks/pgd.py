"""Projected gradient descent (Madry et al., ICLR 2018), on the attack's loss upwards; and its one step, FGSM.

In the l1 ball PGD takes SLIDE's sparse steps (Tramer & Boneh, NeurIPS 2019) and projects onto ball and box at once
(Croce & Hein, ICML 2021): see `purify_fast.ops.pgd_step`. SLIDE moves a constant share of the coordinates, each by the
same amount, so that the change cannot gather in the coordinates where it raises the loss most. This implementation
moves ever fewer coordinates. FGSM is the fast gradient (sign) method (Goodfellow et al., ICLR 2015).

Models map images [B, C, H, W] in [clip_min, clip_max] to logits [B, classes]. They are attacked in evaluation mode,
with gradients to the input only, and come back as they were (`purify_fast.attacks.frozen`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._validation import AtLeast0, Count, NormName
from ..ops.pgd_step import per_sample, pgd_step
from ..protocols import Classifier
from ..speed.graphs.step_graphs import State, begin_steps
from .arguments import check_not_negative
from .ball import Ball, normal_in_ball, sample_in_ball
from .base import NORMS, Attack, AttackResult, as_function, cost_of_ascents, times, worst_of_runs
from .context import AttackContext
from .losses import Loss
from .objective import Objective
from .search import GradientHealth, Search, noted, remembers

#: The share of the coordinates that the first step in the l1 ball moves.
FIRST_DENSITY = 0.1


@dataclass(frozen=True)
class Ascent:
    """One step of PGD as a function of tensors, which has no branch on what they hold: it can be captured.

    Args:
        objective: the loss that is raised.
        ball: its norm and its box are used; the radii are those of the state.
        density: the share of the coordinates that a step in "l1" moves. None, if it changes from step to step: the
            gradient then replaces the new point in the result, and `move` takes the step.

    The state has ``x``, the clean images, and ``point``, ``[B, ...]``; ``y``, labels; ``eps`` and ``alpha``, ``[B]``;
    the memory of a `Search`; and without a density also ``gradient``, ``[B, ...]``.
    """

    objective: Objective
    ball: Ball
    density: float | None

    @property
    def model(self) -> Classifier:
        """The model under attack."""
        return self.objective.model

    def __call__(self, state: State) -> State:
        if remembers(state):
            now = self.objective.gradient(state["point"], state["y"])
            new, image = noted(self.objective, state, state["point"], now), now.image
        else:
            # Nothing is remembered about the points, as in training, so their scores are not computed.
            new, image = {}, self.objective.direction(state["point"], state["y"])
        gradient = image.to(state["x"].dtype)
        if self.density is None:
            return {**new, "gradient": gradient}
        return {**new, "point": self.move(state, gradient, self.density)}

    def move(self, state: State, gradient: Tensor, density: float) -> Tensor:
        """The next point, by the gradient at this point, with its shape and dtype."""
        x, alpha, eps = state["x"], state["alpha"], state["eps"]
        return pgd_step(state["point"], gradient, x, alpha, eps, density=density, **self.ball.bounds)


def ascend(
    objective: Objective,
    ball: Ball,
    state: State,
    *,
    steps: int,
    first: int = 0,
    end: int | None = None,
    density: float | None = None,
) -> State:
    """Take the steps of PGD.

    Args:
        objective: the loss that is raised; its graphs capture the step.
        ball: the ball around each image.
        state: the state with which `Ascent` begins, without eps. Without ``alpha`` the length of a step falls
            geometrically from eps to a hundredth of it.
        steps: the steps of the whole attack.
        first: the step to begin with, from 0.
        end: the step before which to stop; None: after the last.
        density: the share of the coordinates that a step in "l1" moves; None: it falls.

    Returns:
        The state after the last step that was taken.
    """
    end = steps if end is None else end
    share = density_at(ball.norm, first, steps) if density is None else density
    changes = ball.norm == "l1" and density is None and steps - first > 1
    ascent = Ascent(objective, ball, None if changes else share)
    falls = "alpha" not in state
    state = {"alpha": ball.eps, **state, "eps": ball.eps}
    if changes:
        state["gradient"] = torch.zeros_like(state["x"])
    loop = begin_steps(objective.graphs, ascent, state)
    for i in range(first, end):
        if falls:
            loop.put(alpha=ball.eps * fall(i, steps))
        loop.take()
        if changes:
            point = ascent.move(loop.state, loop.state["gradient"], density_at(ball.norm, i, steps))
            loop.put(point=point)
    return loop.values()


def fall(i: int, steps: int) -> float:
    """The factor for the length of step i, from 0: 1 at the first step, a hundredth at the last."""
    return 100.0 ** (-i / max(1, steps - 1))


def density_at(norm: str, i: int, steps: int) -> float:
    """The share of the coordinates that step i, from 0, moves in l1; for other norms an unused constant."""
    # For the other norms the number stays the same, because a compiler would compile the step again for a new one.
    return FIRST_DENSITY * fall(i, steps) if norm == "l1" else FIRST_DENSITY


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent on the attack loss, in several runs; each image keeps the result of its worst run.

    Args:
        eps: radius of the attack's own ball, in image units; None: the ball of the evaluation.
        norm: norm of the attack's own ball: "linf", "l2" or "l1". It needs an eps. None: the norm of the evaluation.
        loss: "ce", "margin", "scaled_margin" or "dlr", which below 3 classes becomes "margin".
        steps: gradient steps; None: as many as the evaluation takes, and 100 without an evaluation.
        random_start: whether the first run begins at a random point; every further run does.
        keep_best: whether a run returns its best point instead of its last: the point that most draws misclassify, then
            the point of highest mean loss. It takes one more forward pass, or two with several draws.
        restarts: number of runs.
        alpha: length of a step in image units, a number or ``[B]``; None: it falls geometrically from eps to eps / 100,
            which is stronger than a constant length (`make demo` has both on its base).
        start_std: standard deviation of a normal random start in image units, projected onto the ball; None: the start
            is uniform in the ball.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "pgd"
    code_version: ClassVar[str] = "3"
    norms: ClassVar[tuple[str, ...]] = NORMS
    #: The first word of the attack's name.
    label: ClassVar[str] = "PGD"

    eps: float | None = None
    norm: NormName | None = None
    loss: Loss = "ce"
    steps: Count | None = None
    random_start: bool = True
    keep_best: bool = True
    restarts: Count = 1
    alpha: float | Tensor | None = None
    start_std: AtLeast0 | None = None

    def __post_init__(self) -> None:
        check_not_negative(alpha=self.alpha)
        super().__post_init__()

    def name(self, context: AttackContext) -> str:
        decided = self.decided(context)
        return f"{self.label}-{decided.steps} {decided.loss}{times(self.restarts)}"

    def cost(self, context: AttackContext) -> int:
        return cost_of_ascents(self, context)

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        ball, steps = self.ball(x, y, context), self.decided(context).steps
        if len(x) == 0:
            return AttackResult(x.clone())
        x = x.detach().clone()
        alpha = None if self.alpha is None else per_sample("alpha", self.alpha, x)

        def attack(objective: Objective, run: int, health: GradientHealth | None) -> Tensor:
            seeds: dict[str, Any] = {"seed": context.seed + run, "sample_ids": context.sample_ids}
            point = x
            if self.random_start or run > 0:
                std = self.start_std
                point = sample_in_ball(x, ball, **seeds) if std is None else normal_in_ball(x, ball, std, **seeds)
            search = Search(objective, point, y, keep_best=self.keep_best, health=health)
            begin: State = {"point": point, "x": x, "y": y, **search.memory}
            if alpha is not None:
                begin["alpha"] = alpha
            last = self.climb(objective, ball, begin, steps, health)
            search.recall(last, steps)
            return search.result(x, last["point"])

        return worst_of_runs(self, attack, (target, x, y), context)

    def climb(self, objective: Objective, ball: Ball, begin: State, steps: int, health: GradientHealth | None) -> State:
        """The state after the steps of one run, from the one in which it begins."""
        return ascend(objective, ball, begin, steps=steps)


@dataclass(frozen=True, kw_only=True)
class LeavingPGD(PGD):
    """PGD that an image leaves once all draws of a step were misclassified; the point of such a step is its best.

    The draws of a step are fresh: no draw has decided where the point lies. So twenty draws that are all wrong are
    twenty independent predictions.

    Args:
        look_every: the number of steps between two looks at which images leave.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    code_version: ClassVar[str] = "3, leaving 1"

    look_every: Count = 20

    def __post_init__(self) -> None:
        if not self.keep_best:
            raise ValueError("keep_best must be True, because an image leaves with its best point, got False")
        super().__post_init__()

    def climb(self, objective: Objective, ball: Ball, begin: State, steps: int, health: GradientHealth | None) -> State:
        whole, state = begin, begin
        # The dimension of the images in each tensor. Tensors without dimensions are the same for all images.
        dims = {name: int(name == "best_score") for name, value in begin.items() if value.dim()}
        index = torch.arange(len(begin["y"]), device=begin["y"].device)
        for first in range(0, steps, self.look_every):
            end = min(steps, first + self.look_every)
            state = ascend(objective, ball.take(index), state, steps=steps, first=first, end=end)
            # Drop the values that `ascend` adds by itself, such as the length of a step. The next call adds them again.
            state = {name: state[name] for name in begin}
            whole = state | {name: whole[name].index_copy(dim, index, state[name]) for name, dim in dims.items()}
            stay = (state["best_score"][0] < 1).nonzero()[:, 0]
            if health is not None:
                # `Search.result` counts gradients for all images and steps. Subtract those that the images which leave
                # now do not take.
                health.add(gradients=(len(stay) - len(index)) * (steps - end))
            if not len(stay):
                break
            index = index[stay]
            state |= {name: state[name].index_select(dim, stay) for name, dim in dims.items()}
        return whole


pgd = as_function("pgd", PGD, "Per image the last point, or with ``keep_best`` the best.", steps=40, keep_best=False)


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One step of length eps from the image itself.

    Args:
        eps: radius of the attack's own ball, in image units; None: the ball of the evaluation.
        norm: norm of the attack's own ball: "linf", "l2" or "l1". It needs an eps. None: the norm of the evaluation.
        loss: "ce", "margin", "scaled_margin" or "dlr", which below 3 classes becomes "margin".

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "fgsm"
    code_version: ClassVar[str] = "2"
    norms: ClassVar[tuple[str, ...]] = NORMS

    eps: float | None = None
    norm: NormName | None = None
    loss: Loss = "ce"

    def name(self, context: AttackContext) -> str:
        return f"FGSM {self.decided(context).loss}"

    def cost(self, context: AttackContext) -> int:
        # The gradient takes the draws. Health takes one prediction of the clean image.
        return self.draws(context) + 1

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        step = context.eps if self.eps is None else self.eps
        check_not_negative(eps=step)
        one = PGD(steps=1, alpha=step, random_start=False, keep_best=False, **asdict(self))
        return one.search(target, x, y, context)


fgsm = as_function("fgsm", FGSM, "Per image the point after the step.")
