"""StAdv (Xiao et al., ICLR 2018): spatially transformed adversarial examples, pixels moved rather than changed.

    x'(p) = x(p + f(p)), bilinear;   f maximises  loss(x') - tau flow_loss(f),   |f| <= eps everywhere
    flow_loss(f) = sum over pixels p and their up to four neighbours q of |f(p) - f(q)|_2

The flow is in units in which the image spans [-1, 1]: 0.05 moves a pixel by 0.8 of 32. The bound, Adam in place of the
paper's L-BFGS, its rate and its 20 steps are those of Laidlaw et al., "Perceptual adversarial robustness", ICLR 2021;
tau = 0.05 is both papers', the first's with the flow in pixels. Two things are not in the papers: beyond its border the
image goes on as it ends, and Adam's small constant is smaller, so that a saturated loss still moves the flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._tensors import per_image
from .._validation import check_literal
from ..ops.pgd_step import per_sample
from ..protocols import Classifier
from ..speed.step_graphs import StepGraphs
from .arguments import check_at_least_one, check_images, check_not_negative
from .ball import Ball, sample_in_ball
from .base import Attack, AttackContext, ThreatModel, cost_of_runs
from .draws import Gradients, Objective, drawn_once_per_call
from .frozen_model import frozen
from .health import GradientHealth
from .losses import Loss, usable_loss
from .search import Search, worst_of_restarts

EPS, RATE, TAU = 0.05, 0.01, 0.05
#: Of Adam: the decays of its means, and the constant that keeps its quotient finite.
BETAS, TINY = (0.9, 0.999), 1e-16
#: Far below any step: neighbours that differ by a rounding error are not pulled together with full force.
CORNER = 1e-5


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Sample every pixel from where the flow points, bilinearly; exactly x at zero flow, and never out of x's range.

    Args:
        x: images, floating point ``[B, C, H, W]``.
        flow: ``[B, 2, H, W]``, to the right and down, in units of half the image.

    Returns:
        Shape and dtype of x; differentiable to the flow, one-sided where it points at a pixel's middle.
    """
    height, width = x.shape[2:]

    def split(offset: Tensor, start: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The pixel before the place, and how far beyond it the place is, in [0, 1]."""
        place = start + offset * (size / 2)
        # clamp() alone may pass no gradient at the border itself
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
    """How far neighbours part, ``[B, 2, H, W]`` -> ``[B]``; every pair counts for both of its pixels, as in the paper.

    |d| is taken as sqrt(|d|^2 + c^2) - c, c = 1e-5: a constant flow has the gradient 0.
    """
    across, down = (((flow.diff(dim=dim).square().sum(1) + CORNER**2).sqrt() - CORNER).sum((1, 2)) for dim in (3, 2))
    return 2 * (across + down)


def stadv(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor = EPS,
    steps: int = 20,
    rate: float = RATE,
    smoothness: float = TAU,
    loss: Loss = "margin",
    eot_iter: int = 1,
    random_start: bool = False,
    keep_best: bool = False,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    max_forward_batch: int | None = None,
    health: GradientHealth | None = None,
    graphs: StepGraphs | None = None,
) -> Tensor:
    """Adam on a flow field, from none at all, clamped to its bound after every step.

    Args:
        model: images ``[B, C, H, W]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack.
        x: images, floating point ``[B, C, H, W]``.
        y: true labels, int64 ``[B]``.
        eps: the largest flow along each axis, half the image being 1; a number or ``[B]``.
        steps: of Adam.
        rate: Adam's learning rate, in the unit of eps.
        smoothness: the paper's tau; 0 attacks hardest, and leaves ragged edges.
        loss: "margin", the paper's, "ce" or "dlr"; "ce" fades where the model is sure, and tau outweighs it.
        eot_iter: draws of a random model averaged per step: in one batch, or each in a call of its own where the model
            draws once per call.
        random_start: whether to begin with a random flow within the bound instead of none.
        keep_best: whether to return, per image, the best iterate seen and not the last, as of `pgd`.
        seed: of the random start.
        sample_ids: int64 ``[B]``; an image's random start depends on the seed and its id alone. None: 0 .. B - 1.
        max_forward_batch: images in one forward pass at most; exact. None: no limit.
        health: counts the loss's gradients to the flow, and movement, if given.
        graphs: on a CUDA device, captures what a step asks of the model, as of `pgd`.

    Returns:
        Adversarial images: shape, dtype and range of x.

    Raises:
        TypeError: x or y is no tensor.
        RuntimeError: it is called within ``torch.inference_mode()``.
        ValueError: a wrong shape, dtype, name or count, or a negative eps, rate or smoothness; or a model
            that writes to its input.
    """
    check_images(x, y)
    check_literal("loss", loss, Loss)
    check_at_least_one(steps=steps, eot_iter=eot_iter, max_forward_batch=max_forward_batch)
    if x.dim() != 4:
        raise ValueError(f"x must be images [B, C, H, W], got {list(x.shape)}")
    check_not_negative(eps=eps, rate=rate, smoothness=smoothness)
    if x.shape[0] == 0:
        return x.clone()
    x = x.detach().clone()
    room = Ball(per_sample("eps", eps, x), "linf", -torch.inf, torch.inf)
    bound = per_image(room.eps, x)
    flow = bound.new_zeros((len(x), 2, *x.shape[2:]))
    if random_start:
        flow = sample_in_ball(flow, room, seed=seed, sample_ids=sample_ids)
    adam = _Adam(flow, rate)
    with frozen(model):
        once = drawn_once_per_call(model, x, eot_iter, max_forward_batch)
        objective = Objective(model, loss, eot_iter, max_forward_batch, graphs, apart=once)
        point = warp(x, flow)
        search = Search(objective, point, y, keep_best=keep_best, health=health)
        gradients = Gradients(objective, point, y, steps)
        for _ in range(steps):
            with torch.enable_grad():
                leaf = flow.detach().requires_grad_()
                moved, roughness = warp(x, leaf), flow_loss(leaf).sum()
            found = gradients.at(point)
            (gradient,) = torch.autograd.grad(moved, leaf, (found.image / eot_iter).to(moved.dtype))
            search.see(point, found._replace(image=gradient))
            (apart,) = torch.autograd.grad(roughness, leaf)
            gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) - smoothness * apart
            flow = (flow + adam.step(gradient)).clamp(-bound, bound)
            point = warp(x, flow)
        search.see_move(x, point)
        return search.result(point)


class _Adam:
    """Adam's running means, and the steps it takes with them."""

    def __init__(self, like: Tensor, rate: float):
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.rate, self.steps = rate, 0

    def step(self, gradient: Tensor) -> Tensor:
        """The step for a gradient, to be added."""
        self.steps += 1
        first, second = BETAS
        self.mean = first * self.mean + (1 - first) * gradient
        self.square = second * self.square + (1 - second) * gradient.square()
        mean, square = self.mean / (1 - first**self.steps), self.square / (1 - second**self.steps)
        return self.rate * (mean / (square.sqrt() + TINY))


@dataclass(frozen=True, kw_only=True)
class StAdv(Attack):
    """StAdv that keeps the best point, as a row of an evaluation; its threat model is a bound on the flow.

    Args:
        loss: "margin", "ce" or "dlr", which below 3 classes becomes "margin".
        steps: of Adam; None: the report's.
        eps: the largest flow along each axis, half the image being 1.
        rate: Adam's learning rate, in the unit of eps.
        smoothness: the paper's tau; 0 attacks hardest, and leaves ragged edges.
        restarts: runs, of which each image keeps its worst; the first begins without a flow, the others with random
            ones.
        eot_iter: draws of a random model averaged per step; None: the report's.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "stadv"

    loss: Loss = "margin"
    steps: int | None = None
    eps: float = EPS
    rate: float = RATE
    smoothness: float = TAU
    restarts: int = 1
    eot_iter: int | None = None

    def __post_init__(self) -> None:
        check_literal("loss", self.loss, Loss)
        check_at_least_one(steps=self.steps, restarts=self.restarts, eot_iter=self.eot_iter)
        check_not_negative(eps=self.eps, rate=self.rate, smoothness=self.smoothness)

    def name(self, context: AttackContext) -> str:
        name = f"StAdv-{self.steps or context.steps} {usable_loss(self.loss, context.num_classes)}"
        return name + (f" x{self.restarts}" if self.restarts > 1 else "")

    def threat_model(self, context: AttackContext) -> ThreatModel:
        return ThreatModel("flow", float(self.eps))

    def cost(self, context: AttackContext) -> int:
        return cost_of_runs(self.steps or context.steps, self.draws(context), self.restarts)

    def settings(self, context: AttackContext) -> dict[str, Any]:
        own = {"loss": usable_loss(self.loss, context.num_classes), "steps": self.steps or context.steps}
        return super().settings(context) | own

    def revision(self) -> str:
        return "3"

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        draws = self.draws(context)

        def attack(run: int) -> Tensor:
            return stadv(
                target,
                x,
                y,
                eps=self.eps,
                steps=self.steps or context.steps,
                rate=self.rate,
                smoothness=self.smoothness,
                loss=usable_loss(self.loss, context.num_classes),
                random_start=run > 0,
                keep_best=True,
                eot_iter=draws,
                max_forward_batch=context.max_forward_batch,
                seed=context.seed + run,
                sample_ids=context.sample_ids,
                health=context.health,
                graphs=context.graphs,
            )

        return worst_of_restarts(attack, target, y, restarts=self.restarts, eot_iter=draws)
