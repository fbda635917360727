"""Branch and bound on a small ReLU network: a complete search of an L-inf ball, which masked gradients cannot mislead.

For each wrong class, the "lead" is the true class's logit minus the wrong class's logit. Over the ball the lead is
bounded from below: each ReLU is replaced by a line above it and a line below it (CROWN, Zhang et al., NeurIPS 2018,
arXiv 1811.00866). If the bound is not above 0, the problem is split at a ReLU into two nodes, in which the ReLU's input
is at least or at most 0 (Bunel et al., JMLR 2020, arXiv 1909.06588). A Lagrange multiplier puts each split's constraint
into the bound (beta-CROWN, Wang et al., NeurIPS 2021, arXiv 2103.06624).

Three things are not in these papers. Polyak's steps optimize the multipliers and the slopes of the lower lines.
Polyak's steps on the lead and the violations of the splits also search each node for a misclassified point. Some of the
next nodes are chosen for the most splits, where misclassified points are found first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.attacks import JudgeContext
from purify_fast.attacks.context import ball_around, projected
from purify_fast.judge.searches.engine.judge import Judge
from purify_fast.judge.searches.engine.row_batches import ActiveSet

from .relu_layers import Affine, affine_layers, forward

#: The steps for each node that raise its lower bound, and that search for a misclassified point from two points.
RAISES, DESCENTS = 5, 15
#: SAFE: a bound is a proof only if it is above this share of the image's largest absolute logit, because the model
#: computes in float32, but this search in float64. ALIKE: the model's logits may differ from the logits in float64 by
#: at most this share of the largest absolute logit.
SAFE, ALIKE = 5e-5, 2e-5
#: NODES: the usual limit of nodes per image. IMAGES: the number of images that are attacked together. AT_ONCE: the
#: largest number of nodes that are split together.
NODES, IMAGES, AT_ONCE = 20_000, 8, 128
#: The share of the next nodes that are chosen for the most splits. The others are chosen for the lowest bounds.
DEEPEST = 0.5
#: The next ReLU to split is chosen by the error of its relaxation at the minimizer of the bound, plus WIDTH times the
#: largest distance between the ReLU and the line above it.
WIDTH = 0.3
#: A step tries to raise the bound to GOAL times the absolute value of the present bound, plus twice the smallest bound
#: that is a proof (see SAFE).
GOAL = 0.05
#: The steps that search for a misclassified point are Polyak's steps with the goal 0, times this factor.
LONG = 3.0
TINY = 1e-12
#: Increase this number if a change makes the search find other points.
REVISION = 1


def branch_and_bound(model: nn.Module, x: Tensor, y: Tensor, eps: float, nodes: int = NODES) -> tuple[Tensor, Tensor]:
    """Search the ball of each image for a misclassified point, or prove that there is none.

    Args:
        model: a network of affine layers with few ReLUs between them, see `affine_layers`.
        x: images ``[B, C, H, W]`` in [0, 1], float32.
        y: labels ``[B]``, int64.
        eps: L-inf radius of the balls in image units.
        nodes: approximate limit of nodes (subproblems) per image. An image that needs more is not proved robust.

    Returns:
        The misclassified points that were found, otherwise the images, with the shape of x; and for each image whether
        it is proved robust, bool ``[B]``.

    Raises:
        ValueError: the model is no such network, or its logits are not those that its layers give in float64.
    """
    with torch.no_grad():
        layers, judge = affine_layers(model, x.shape[1:]), Judge(model)
        logits = judge.logits(x).double()
        apart = (forward(layers, x.double().flatten(1)) - logits).abs().max()
        if not apart <= ALIKE * logits.abs().max():
            text = "the model's logits differ from the logits that its layers give in float64"
            raise ValueError(f"{text}, by {apart:.2g}: if TF32 or bfloat16 is on, switch it off")
        active = ActiveSet(x, y, ball_around(x, eps), judge, JudgeContext(eps=eps))
        active.judge_clean_images()
        proved = torch.zeros_like(y, dtype=torch.bool)
        for part in active.left().split(IMAGES):
            proved[part] = _Search(layers, active, part).run(nodes)
    return active.best, proved


#: Pairs of the smallest and the largest values in each node. The first pair bounds the pixels, ``[B, pixels]``. Each
#: further pair bounds the inputs of a layer of ReLUs, ``[B, units]``.
_Boxes = list[tuple[Tensor, Tensor]]


class _Nodes(NamedTuple):
    """Subproblems ("nodes"); every field has an entry per node: ``[B]``, or ``[B, units]`` with a column for each ReLU.

    ``signs`` are 1 or -1 for split ReLUs, else 0. ``slopes`` are those of the lines below the ReLUs, negative before
    they are chosen. ``prices`` are the multipliers of the splits. ``least`` bounds the lead. ``unit`` is the ReLU to
    split next, or -1.
    """

    owner: Tensor
    rival: Tensor
    signs: Tensor
    slopes: Tensor
    prices: Tensor
    least: Tensor
    unit: Tensor

    def take(self, index: Tensor) -> _Nodes:
        """Return some of the nodes, selected by an int64 or bool index."""
        return _Nodes(*(each[index] for each in self))

    @staticmethod
    def joined(parts: Sequence[_Nodes]) -> _Nodes:
        """Join several sets of nodes into one."""
        return _Nodes(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def halves(self) -> _Nodes:
        """Return two halves of each node that has a ReLU to split, and all other nodes unchanged."""
        others, split = self.take(self.unit < 0), self.take(self.unit >= 0)
        signs = [split.signs.scatter(1, split.unit[:, None], sign) for sign in (1, -1)]
        return _Nodes.joined([others, *(split._replace(signs=each) for each in signs)])


class _Search:
    """Branch and bound on the images ``part`` of ``active``."""

    def __init__(self, layers: Sequence[Affine], active: ActiveSet, part: Tensor):
        self.layers, self.active, self.part, self.y = layers, active, part, active.y[part]
        ball, x = active.ball.take(part), active.x[part].flatten(1).double()
        reach = ball.eps.double()[:, None]
        self.low, self.high = ((x + way * reach).clamp(ball.clip_min, ball.clip_max) for way in (-1, 1))
        self.safe = SAFE * forward(layers, x).abs().amax(1)
        self.widths = [len(bias) for _, bias in layers[:-1]]

    def run(self, limit: int) -> Tensor:
        """Search until every image has fallen, is proved robust or has had ``limit`` nodes; return which are proved."""
        count, classes, device = len(self.y), len(self.layers[-1].bias), self.y.device
        owner, rival = torch.ones(count, classes, device=device).nonzero().unbind(1)
        owner, rival = (each[rival != self.y[owner]] for each in (owner, rival))
        none = torch.zeros(len(owner), sum(self.widths), device=device)
        least = torch.full((len(owner),), -torch.inf, dtype=torch.float64, device=device)
        left = _Nodes(owner, rival, none.to(torch.int8), none - 1, none, least=least, unit=torch.full_like(owner, -1))
        made, ended = torch.zeros_like(self.y), torch.zeros_like(self.y, dtype=torch.bool)
        while len(left.owner):
            chosen = self.chosen(left)
            nodes = left.take(chosen).halves()
            made += torch.bincount(nodes.owner, minlength=count)
            left = _Nodes.joined([left.take(~chosen), self.bounded(nodes)])
            ended |= (made >= limit) & (torch.bincount(left.owner, minlength=count) > 0)
            left = left.take(~(ended | self.active.fallen[self.part])[left.owner])
        return ~ended & ~self.active.fallen[self.part]

    def chosen(self, nodes: _Nodes) -> Tensor:
        """Choose the next nodes, bool ``[B]``: nodes with the most splits, and nodes with the lowest bounds."""
        order = nodes.least.argsort()
        deepest = order[nodes.signs.abs().sum(1)[order].argsort(descending=True, stable=True)]
        chosen, share = torch.zeros_like(order, dtype=torch.bool), int(DEEPEST * AT_ONCE)
        chosen[torch.cat([deepest[:share], order[: AT_ONCE - share]])] = True
        return chosen

    def bounded(self, nodes: _Nodes) -> _Nodes:
        """Bound nodes, search those without a proof, and return them, each with ``unit``, its next ReLU to split."""
        boxes = self.boxes(nodes)
        nodes, corners, weights = self.raised(nodes, boxes)
        # A node whose signs contradict each other contains no point, so it is dropped.
        empty = torch.stack([(low > high).any(1) for low, high in boxes]).any(0)
        stays = (nodes.least <= self.safe[nodes.owner]) & ~empty
        nodes, corners, weights = nodes.take(stays), corners[:, stays], weights[stays]
        boxes = [(low[stays], high[stays]) for low, high in boxes]
        for start in (corners[-1], corners.mean(0)):
            self.descend(nodes, boxes, start)
        return nodes._replace(unit=self.to_split(nodes, boxes, corners[-1], weights))

    def boxes(self, nodes: _Nodes) -> _Boxes:
        """The smallest and the largest values of the pixels and of the ReLUs' inputs in each node."""
        boxes = [(self.low[nodes.owner], self.high[nodes.owner])]
        for i, signs in enumerate(nodes.signs.split(self.widths, 1)):
            weight, bias = self.layers[i]
            least, most = (end.relu() for end in boxes[-1]) if i else boxes[-1]
            middle, radius = (least + most) / 2 @ weight.T + bias, (most - least) / 2 @ weight.abs().T
            low, high = middle - radius, middle + radius
            if i:
                # Sometimes the interval bound is tighter, sometimes CROWN's bound. So the tighter bound is taken.
                both = Affine(torch.cat([weight, -weight])[None], torch.cat([bias, -bias]))
                ends, upper = self.least(boxes, both, _smallest_areas(boxes))[0].split(len(bias), 1)
                low, high = torch.maximum(low, ends), torch.minimum(high, -upper)
            boxes.append((low.where(signs <= 0, low.clamp(min=0)), high.where(signs >= 0, high.clamp(max=0))))
        return boxes

    def least(
        self, boxes: _Boxes, functions: Affine, slopes: Tensor, prices: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Compute lower bounds of linear functions of the outputs of a layer's ReLUs, by CROWN's backward pass."""
        (weight, constant), weights = functions, []
        ends = slopes.shape[1]
        for (low, high), layer in zip(reversed(boxes[1:]), reversed(self.layers[: len(boxes) - 1]), strict=True):
            weights.append(weight)
            begins = ends - low.shape[1]
            above = _above(low, high)
            below = torch.where((low < 0) & (high > 0), slopes[:, begins:ends], above)
            negative = weight.clamp(max=0)
            constant = constant - (negative * (low.clamp(max=0) * above)[:, None]).sum(2)
            weight = weight.clamp(min=0) * below[:, None] + negative * above[:, None]
            if prices is not None:
                weight = weight - prices[:, None, begins:ends]
            constant = constant + weight @ layer.bias
            weight, ends = weight @ layer.weight, begins
        middle, radius = (boxes[0][0] + boxes[0][1]) / 2, (boxes[0][1] - boxes[0][0]) / 2
        bound = constant + (weight @ middle[:, :, None] - weight.abs() @ radius[:, :, None])[:, :, 0]
        return bound, weight, weights[::-1]

    def raised(self, nodes: _Nodes, boxes: _Boxes) -> tuple[_Nodes, Tensor, Tensor]:
        """Raise the bounds of nodes by steps in their slopes and in their prices (the multipliers of their splits)."""
        (weight, bias), y, rival, signs = self.layers[-1], self.y[nodes.owner], nodes.rival, nodes.signs
        lead = Affine((weight[y] - weight[rival])[:, None], (bias[y] - bias[rival])[:, None])
        slopes = torch.where(nodes.slopes < 0, _smallest_areas(boxes), nodes.slopes.double())
        # Each multiplier is scaled by the range of its ReLU's input, so that the same step length suits all of them.
        low, high = _of_all(boxes)
        prices, unit = nodes.prices.double(), 1 / (high - low).clamp(min=TINY)
        least, corners = nodes.least, []
        for step in range(RAISES + 1):
            slopes, prices = slopes.detach().requires_grad_(), prices.detach().requires_grad_()
            with torch.enable_grad():
                bound, normal, weights = self.least(boxes, lead, slopes, prices * signs)
                total = bound.sum()
            bound = bound.detach()[:, 0]
            least = torch.maximum(least, bound)
            corners.append(torch.where(normal.detach()[:, 0] > 0, *boxes[0]))
            # No step follows the last bound. Without ReLUs the first bound is already exact.
            if step == RAISES or not self.widths:
                break
            up, dearer = torch.autograd.grad(total, (slopes, prices))
            # A slope or price at the end of its range must not leave the range, so an outward gradient is set to 0.
            up = up * torch.where(up > 0, slopes < 1, slopes > 0)
            dearer = unit * dearer * ((dearer > 0) | (prices > 0))
            missing = (2 * self.safe[nodes.owner] + GOAL * bound.abs() - bound).clamp(min=0)
            length = (missing / (up.square() + dearer.square()).sum(1).clamp(min=TINY))[:, None]
            slopes, prices = (slopes + length * up).clamp(0, 1), (prices + length * dearer * unit).clamp(min=0)
        nodes = nodes._replace(slopes=slopes.detach().float(), prices=prices.detach().float(), least=least)
        return nodes, torch.stack(corners), torch.cat([*(each.detach()[:, 0] for each in weights), low[:, :0]], 1)

    def to_split(self, nodes: _Nodes, boxes: _Boxes, corner: Tensor, weights: Tensor) -> Tensor:
        """The next ReLU to split, whose relaxation lowers the bound most; -1 if the sign of every input is known."""
        low, high = _of_all(boxes)
        at, inputs = corner, [low[:, :0]]
        for i, (weight, bias) in enumerate(self.layers[:-1]):
            at = (at.relu() if i else at) @ weight.T + bias
            inputs.append(at)
        z, above = torch.cat(inputs, 1), _above(low, high)
        error = torch.where(weights < 0, above * (z - low) - z.relu(), z.relu() - nodes.slopes * z)
        score = weights.abs() * (error - WIDTH * low * above)
        score = score.masked_fill((low >= 0) | (high <= 0), -torch.inf)
        return F.pad(score, (1, 0), value=-torch.inf).argmax(1) - 1

    def descend(self, nodes: _Nodes, boxes: _Boxes, x: Tensor) -> None:
        """Search each node for a misclassified point from x ``[B, pixels]``, with the signs of the node."""
        (low, high), y, rival, safe = boxes[0], self.y[nodes.owner], nodes.rival, self.safe[nodes.owner]
        signs = nodes.signs.double().split(self.widths, 1)
        best, smallest = x, torch.full_like(safe, torch.inf)
        for _ in range(DESCENTS):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                at, lacks = x, torch.zeros_like(safe)
                for (weight, bias), box, sign in zip(self.layers, boxes[1:], signs, strict=False):
                    z = at @ weight.T + bias
                    lacks = lacks + (-sign * z).relu().square().sum(1)
                    # If the input of a ReLU has only one sign in the node, the ReLU is computed as a linear function,
                    # even where the input has the other sign.
                    at = torch.where((box[0] < 0) & (box[1] > 0), z.relu(), z * (box[0] >= 0))
                weight, bias = self.layers[-1]
                lead = ((weight[y] - weight[rival]) * at).sum(1) + bias[y] - bias[rival]
                lacks = lacks + (lead + safe).relu().square()
                gradient = torch.autograd.grad(lacks.sum(), x)[0]
            x, lacks, logits = x.detach(), lacks.detach(), forward(self.layers, x.detach())
            true = (logits.gather(1, y[:, None]) - logits.gather(1, rival[:, None]))[:, 0]
            best, smallest = torch.where((true < smallest)[:, None], x, best), torch.minimum(true, smallest)
            gradient = gradient * torch.where(gradient > 0, x > low, x < high)
            length = LONG * lacks / gradient.square().sum(1).clamp(min=TINY)
            x = (x - length[:, None] * gradient).clamp(low, high)
        claims = smallest <= 0
        owner = self.part[nodes.owner[claims]]
        clean = self.active.x[owner]
        points = projected(clean, best[claims].to(clean.dtype).view_as(clean), self.active.ball.take(owner))
        self.active.confirm_successes(owner, points, torch.ones_like(smallest[claims]))


def _of_all(boxes: _Boxes) -> tuple[Tensor, Tensor]:
    """The smallest and the largest inputs of all ReLUs, ``[B, units]``."""
    low, high = zip(*boxes, strict=True)
    return torch.cat([low[0][:, :0], *low[1:]], 1), torch.cat([high[0][:, :0], *high[1:]], 1)


def _above(low: Tensor, high: Tensor) -> Tensor:
    """The slopes of the lines above ReLUs; for an input with only one sign, the slope of the ReLU itself."""
    return high.relu() / (high.relu() - low.clamp(max=0)).clamp(min=TINY)


def _smallest_areas(boxes: _Boxes) -> Tensor:
    """The slopes of the lower lines, ``[B, units]``, for which the areas between lower and upper lines are smallest."""
    low, high = _of_all(boxes)
    return (high > -low).double()
