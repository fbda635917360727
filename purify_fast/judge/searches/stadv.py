"""StAdv: an attack that shifts pixels (Xiao et al., ICLR 2018, arXiv 1801.02612)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..._tensors import per_image, per_sample
from ..._validation import AtLeast0, Count, check_types
from ...attacks.attacked_model import check_eps, check_images
from ...attacks.base import (
    Attack,
    AttackContext,
    AttackResult,
    Ball,
    ThreatModel,
    keeping,
    sample_in_ball,
    times,
    worst_of_runs,
)
from ...attacks.objective import (
    Gradient,
    GradientHealth,
    Loss,
    Objective,
    ObjectiveStep,
    Search,
)
from ...protocols import Classifier
from ...speed.graphs.step_loop import State, begin_steps

EPS, RATE, TAU = 0.05, 0.01, 0.05
#: Adam's decay rates, and its epsilon, the constant that keeps its quotient finite.
BETAS, TINY = (0.9, 0.999), 1e-16
#: If the flows of two neighbors differ by less than this value, the gradient of the flow loss is reduced, because such
#: a difference is only rounding. The value is far below any step.
CORNER = 1e-5


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Shift the pixels of x: sample bilinearly where each flow points. At zero flow the result is exactly x."""
    height, width = x.shape[2:]

    def split(offset: Tensor, start: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The index of the pixel before the sampled place, and the distance from this pixel to the place, in [0, 1]."""
        place = start + offset * (size / 2)
        # `clamp()` alone may have no gradient at the edge of the image.
        inside = (place >= 0) & (place <= size - 1)
        place = torch.where(inside, place, place.detach().clamp(0, size - 1))
        before = place.detach().floor().clamp(max=max(size - 2, 0))
        return before.long(), (place - before)[:, None]

    left, right = split(flow[:, 0], torch.arange(width, device=x.device), width)
    top, down = split(flow[:, 1], torch.arange(height, device=x.device)[:, None], height)
    flat = x.to(flow.dtype).flatten(2)

    def pixel(dy: int, dx: int) -> Tensor:
        index = (top + dy).clamp(max=height - 1) * width + (left + dx).clamp(max=width - 1)
        return flat.gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)

    above, below = (torch.lerp(pixel(dy, 0), pixel(dy, 1), right.expand_as(x)) for dy in (0, 1))
    return torch.lerp(above, below, down.expand_as(x)).to(x.dtype)


def flow_loss(flow: Tensor) -> Tensor:
    """The sum of the distances between the flows of neighbors, ``[B, 2, H, W]`` -> ``[B]``. Each pair counts twice.

    A distance |d| is computed as sqrt(|d|^2 + c^2) - c with c = 1e-5, so that the gradient is 0 for a constant flow.
    """
    across, down = (((flow.diff(dim=dim).square().sum(1) + CORNER**2).sqrt() - CORNER).sum((1, 2)) for dim in (3, 2))
    return 2 * (across + down)


class GradientStep(ObjectiveStep):
    """`Objective.gradient` as a step."""

    def __call__(self, state: State) -> State:
        """The gradient, the loss and the share of misclassified draws at ``point`` for the labels ``y``."""
        return self.objective.gradient(state["point"], state["y"])._asdict()


@dataclass(frozen=True, kw_only=True)
class StAdv(Attack):
    """StAdv: Adam on a flow field, which is clamped to ``eps`` after every step.

    Args:
        loss: "margin" (the paper's loss), "ce", "scaled_margin" or "dlr". If the model is confident, the gradient of
            "ce" is smaller than that of the flow loss. With fewer than 3 classes "margin" replaces "dlr".
        steps: number of gradient steps. None takes the evaluation's number, or 100 without an evaluation.
        random_start: whether the first run begins with a random flow within ``eps``, as every further run does.
        keep_best: whether a run returns its best point instead of its last point, see `purify_fast.attacks.PGD`.
        restarts: number of runs; each image keeps the best point of all runs.
        eps: the largest flow along each axis, in units of half the image, a number or ``[B]``.
        rate: Adam's learning rate, in the unit of eps.
        smoothness: the paper's tau. With 0 the attack is strongest, but edges in the images become ragged.
    """

    kind: ClassVar[str] = "stadv"
    code_version: ClassVar[str] = "3"

    loss: Loss = "margin"
    steps: Count | None = None
    random_start: bool = False
    keep_best: bool = True
    restarts: Count = 1
    eps: float | Tensor = EPS
    rate: AtLeast0 = RATE
    smoothness: AtLeast0 = TAU

    def __post_init__(self) -> None:
        if not isinstance(self.eps, Tensor):
            check_eps(self.eps, None)
        check_types(self)

    def name(self, context: AttackContext) -> str:
        resolved = self.resolved_for(context)
        return f"StAdv-{resolved.steps} {resolved.loss}{times(self.restarts)}"

    def threat_model(self, context: AttackContext) -> ThreatModel:
        return ThreatModel("flow", float(self.eps))

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        check_images(x, y)
        if x.dim() != 4:
            raise ValueError(f"x must be images [B, C, H, W], got {list(x.shape)}")
        if len(x) == 0:
            return AttackResult(x.clone())
        x, steps = x.detach().clone(), self.resolved_for(context).steps
        ball = Ball(per_sample("eps", self.eps, x), "linf", -torch.inf, torch.inf)
        bound, zeros = per_image(ball.eps, x), torch.zeros(len(x), device=x.device)
        wide = torch.promote_types(x.dtype, torch.float32)

        def attack(objective: Objective, run: int, health: GradientHealth | None) -> Tensor:
            flow = bound.new_zeros((len(x), 2, *x.shape[2:]))
            if self.random_start or run > 0:
                flow = sample_in_ball(flow, ball, seed=context.seed + run, sample_ids=context.sample_ids)
            mean = square = torch.zeros_like(flow)
            point, (first, second) = warp(x, flow), BETAS
            search = Search(objective, point, y, keep_best=self.keep_best, health=health)
            state = {"point": point, "y": y, "image": torch.zeros_like(point), "loss": zeros.to(wide), "wrong": zeros}
            loop = begin_steps(objective.graphs, GradientStep(objective), state)
            with keeping(lambda: search.memory.get("best", point)):
                for number in range(1, steps + 1):
                    with torch.enable_grad():
                        leaf = flow.detach().requires_grad_()
                        moved, roughness = warp(x, leaf), flow_loss(leaf).sum()
                    loop.put(point=point)
                    loop.advance()
                    at_point = Gradient(**loop.values("image", "loss", "wrong"))
                    outer = (at_point.image / objective.eot_iter).to(moved.dtype)
                    (gradient,) = torch.autograd.grad(moved, leaf, outer)
                    search.see(point, at_point._replace(image=gradient))
                    (apart,) = torch.autograd.grad(roughness, leaf)
                    gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) - self.smoothness * apart
                    mean = first * mean + (1 - first) * gradient
                    square = second * square + (1 - second) * gradient.square()
                    length = (square / (1 - second**number)).sqrt() + TINY
                    flow = (flow + self.rate * (mean / (1 - first**number) / length)).clamp(-bound, bound)
                    point = warp(x, flow)
            return search.result(x, point)

        return worst_of_runs(self, attack, (target, x, y), context)
