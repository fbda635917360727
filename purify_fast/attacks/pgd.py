"""PGD (Madry et al., ICLR 2018).

In the l1 ball PGD takes SLIDE's sparse steps (Tramer & Boneh, NeurIPS 2019), and projects onto the intersection of ball
and box (Croce & Hein, ICML 2021). SLIDE moves a constant share of the coordinates; here the share falls step by step.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .._tensors import per_sample
from .._validation import AtLeast0, Count, GradientPrecision, Norm, Range
from ..ops.pgd_step import NORMS, OP as STEP, per_pixel, pgd_step
from ..protocols import Classifier
from ..speed.graphs.step_loop import State, begin_steps
from .attacked_model import check_tensor
from .base import (
    AttackContext,
    AttackResult,
    Ball,
    InBall,
    keeping,
    normal_in_ball,
    sample_in_ball,
    times,
    worst_of_runs,
)
from .objective import GradientHealth, Loss, Objective, ObjectiveStep, Search, after_point

#: The share of the coordinates that the first step in the l1 ball moves.
FIRST_DENSITY = 0.1


def reference(
    model: Classifier, x: Tensor, y: Tensor, start: Tensor, *, eps: float, alpha: float, steps: int
) -> Tensor:
    """Take the steps of PGD in the linf ball, in plain PyTorch. The class `PGD` takes the same steps in less time.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]``, in evaluation mode.
        x: images in [0, 1], floating point ``[B, ...]``.
        y: true labels, int64 ``[B]``.
        start: the first points, such as x or points drawn in the ball, with shape and dtype of x.
        eps: radius of the ball around each image, in image units.
        alpha: length of a step in image units.
        steps: number of steps.

    Returns:
        The last points, with shape and dtype of x.
    """
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    point = start
    for _ in range(steps):
        point = point.detach().requires_grad_()
        # The sum makes the gradient of each image independent of the other images.
        loss = F.cross_entropy(model(point), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
        point = (point.detach() + alpha * gradient.sign()).clamp(low, high)
    return point


@dataclass(frozen=True)
class Ascent(ObjectiveStep):
    """One step of PGD as a function of tensors; no branch depends on their values, so a CUDA graph can capture it.

    Attributes:
        norm: norm of the ball.
        lo: lower end of the box; None: a tensor of the state.
        hi: upper end of the box, like ``lo``.
        pixelwise: whether pixels have radii, lengths or ranges of their own.
        density: the share of the coordinates that a step in "l1" moves. If it is None, the share changes from step to
            step. The result then has the gradient, and the caller takes the step.
        remembers: whether the state has the memory of a `Search`.
    """

    norm: Norm
    lo: float | None
    hi: float | None
    pixelwise: bool
    density: float | None
    remembers: bool

    def may_be_compiled(self, state: State) -> bool:
        # All passes of a compiled step would have the same seed.
        return self.objective.at_once(len(state["point"])) == (len(state["point"]), self.objective.eot_iter)

    def on(self, model: Classifier) -> Ascent:
        """Return the same step on another model."""
        return replace(self, objective=replace(self.objective, model=model))

    def __call__(self, state: State) -> State:
        # The forward pass, the loss and the backward pass.
        gradient = self.objective.gradient(state["point"], state["y"])
        new = after_point(self.objective, state, state["point"], gradient) if self.remembers else {}
        if self.density is None:
            new["gradient"] = gradient.image
        else:
            new["point"] = self.step(state, gradient.image, self.density)
        return new

    def step(self, state: State, gradient: Tensor, density: float) -> Tensor:
        """The next points: a step along the gradient, and the projection onto the ball and the box."""
        points, lengths = (state["point"], gradient, state["x"]), (state["alpha"], state["eps"])
        box = state["lo"] if self.lo is None else self.lo, state["hi"] if self.hi is None else self.hi
        if self.pixelwise:
            return pgd_step(*points, *lengths, self.norm, *box, density)
        # The arguments were checked when the attack began.
        return STEP(*points, *lengths, NORMS.index(self.norm), *box, density, variant=self.norm)


def fall(i: int, steps: int) -> float:
    """The factor for the length of step i (counted from 0): 1 at the first step, a hundredth at the last."""
    return 100.0 ** (-i / max(1, steps - 1))


@dataclass(frozen=True, kw_only=True)
class PGD(InBall):
    """Projected gradient ascent on the attack's loss, in several runs; each image keeps the best point of all runs.

    Args:
        loss: "ce", "margin", "scaled_margin" or "dlr". With fewer than 3 classes "margin" replaces "dlr".
        steps: number of gradient steps. None takes the evaluation's number, or 100 without an evaluation.
        random_start: whether the first run begins at a random point, as every further run does.
        keep_best: whether a run returns its best point (misclassified by the most draws, then of the highest mean loss)
            instead of its last point. The option takes one more forward pass, or two with several draws.
        restarts: number of runs.
        alpha: length of a step in image units, a number or ``[B]``. With None, the length falls geometrically from eps
            to eps / 100, which makes a stronger attack than a constant length.
        start_std: standard deviation, in image units, of a normal random start that is projected onto the ball. With
            None, the start is uniform in the ball.
        precision: precision of the steps: "float32" is that of the model itself, "bfloat16" takes a copy that
            multiplies in bfloat16, and "auto" takes such a copy if the device is faster with it and the model is large
            enough.
    """

    kind: ClassVar[str] = "pgd"
    code_version: ClassVar[str] = "4"
    #: The first word of the attack's name.
    label: ClassVar[str] = "PGD"

    loss: Loss = "ce"
    steps: Count | None = None
    random_start: bool = True
    keep_best: bool = True
    restarts: Count = 1
    alpha: float | Tensor | None = None
    start_std: AtLeast0 | None = None
    precision: GradientPrecision = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.alpha, Tensor):
            check_tensor("alpha", self.alpha)
        elif self.alpha is not None and not self.alpha >= 0:
            Range(0).check("alpha", self.alpha)
        super().__post_init__()

    def name(self, context: AttackContext) -> str:
        resolved = self.resolved_for(context)
        return f"{self.label}-{resolved.steps} {resolved.loss}{times(self.restarts)}"

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        ball, steps = self.ball(x, y, context), self.steps or self.usual_steps or context.steps
        if len(x) == 0:
            return AttackResult(x.clone())
        # A model that writes to its images, by x.data, must not write to the caller's.
        x = x.detach() if self.random_start else x.detach().clone()
        lengths = {}
        if isinstance(self.alpha, Tensor):
            lengths = {"alpha": per_pixel("alpha", self.alpha, x).detach()}
        elif self.alpha is not None:
            lengths = {"alpha": per_sample("alpha", self.alpha, x)}

        def attack(objective: Objective, run: int, health: GradientHealth | None) -> Tensor:
            point, seed, ids = x, context.seed + run, context.sample_ids
            if self.random_start or run > 0:
                if self.start_std is None:
                    point = sample_in_ball(x, ball, seed=seed, sample_ids=ids)
                else:
                    point = normal_in_ball(x, ball, self.start_std, seed=seed, sample_ids=ids)
            begin: State = {"point": point, "x": x, "y": y, **lengths}
            if not self.keep_best and health is None:
                return self.climb(objective, ball, begin, health, steps=steps, part=range(steps))["point"]
            search = Search(objective, point, y, keep_best=self.keep_best, health=health)
            last = self.climb(objective, ball, begin | search.memory, health, steps=steps, part=range(steps))
            search.recall(last, steps)
            return search.result(x, last["point"])

        return worst_of_runs(self, attack, (target, x, y), context)

    def climb(
        self, objective: Objective, ball: Ball, state: State, health: GradientHealth | None, *, steps: int, part: range
    ) -> State:
        """Take a ``part`` of the ``steps`` of a run, and return the last state.

        ``state`` has the images and labels, "point", "x" and "y"; the length of a step, "alpha", unless it falls; and
        the memory of a `Search`.
        """
        norm, lo, hi = ball.norm, ball.clip_min, ball.clip_max
        # In l1, every step moves another share of the coordinates.
        changes, falls = norm == "l1" and steps - part.start > 1, self.alpha is None
        state = {"alpha": ball.eps, **state, "eps": ball.eps}
        if isinstance(lo, Tensor) or isinstance(hi, Tensor):
            # A captured step is replayed for other ranges too, so they belong to the state.
            state |= {"lo": torch.as_tensor(lo).to(state["x"]), "hi": torch.as_tensor(hi).to(state["x"])}
            lo = hi = None
        pixelwise = lo is None or ball.eps.dim() > 1 or state["alpha"].dim() > 1
        if changes:
            state["gradient"] = torch.zeros_like(state["x"])
        density = None if changes else FIRST_DENSITY * (fall(part.start, steps) if norm == "l1" else 1.0)
        remembers = self.keep_best or health is not None
        ascent = Ascent(objective, norm, lo, hi, pixelwise, density=density, remembers=remembers)
        loop = begin_steps(objective.graphs, ascent, state)
        with keeping(lambda: loop.values()["best" if self.keep_best else "point"]):
            for i in part:
                if falls:
                    loop.put(alpha=ball.eps * fall(i, steps))
                loop.advance()
                if changes:
                    share = FIRST_DENSITY * fall(i, steps)
                    loop.put(point=ascent.step(loop.state, loop.state["gradient"], share))
        return loop.values()


# -- FGSM (Goodfellow et al., ICLR 2015), a single step ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FGSM(InBall):
    """A single step of length eps, which begins at the image.

    Args:
        loss: "ce", "margin", "scaled_margin" or "dlr". With fewer than 3 classes "margin" replaces "dlr".
        precision: precision of the step, see `PGD`.
    """

    kind: ClassVar[str] = "fgsm"
    code_version: ClassVar[str] = "3"

    loss: Loss = "ce"
    precision: GradientPrecision = "auto"

    def name(self, context: AttackContext) -> str:
        return f"FGSM {self.resolved_for(context).loss}"

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        # The length of the first step is eps.
        return PGD(steps=1, random_start=False, keep_best=False, **asdict(self)).search(target, x, y, context)
