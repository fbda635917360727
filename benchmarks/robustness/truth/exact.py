"""Decides exactly, in float64, whether any image of an L-inf ball fools a small ReLU network.

Three steps decide an image; each begins where the step before left it open. A bound that holds for the whole ball
proves that nothing fools the network. A misclassified point of the ball proves the contrary. A mixed-integer program
for each class that is left open proves either. No attack of the package takes part.

The bounds are those of CROWN (Zhang et al., NeurIPS 2018, arXiv 1811.00866), the program that of Tjeng et al. (ICLR
2019, arXiv 1711.07356), solved by HiGHS.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from purify_fast.attacks.relu_layers import Affine, forward

#: A positive margin below this is no proof, because HiGHS satisfies constraints only up to 1e-6. For a negative margin
#: of less than this size a clearer point is searched, which fools the network in float32 too.
TOLERANCE = 1e-5
#: A bound that HiGHS computes is loosened by this amount, to be safe from rounding.
SLACK = 1e-6
#: The status that `scipy.optimize.milp` returns for a solution, and for the proof that there is none.
OPTIMAL, INFEASIBLE = 0, 2
#: The search for a misclassified point takes STEPS steps from each of STARTS random starts.
STARTS, STEPS = 5, 40
ROBUST, FALLS, UNDECIDED = "robust", "falls", "undecided"
BOUND, POINT, MILP = "bound", "point", "milp"


#: The lowest and the highest value of each pixel or unit, flat, float64.
Box = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Decision:
    """The decision on an image.

    Args:
        verdict: `ROBUST`, `FALLS` or `UNDECIDED`.
        how: the step that decided it, or was tried last: `BOUND`, `POINT` or `MILP`.
        seconds: processor time of the decision.
        point: a misclassified image of the ball, float64, if there is one.
    """

    verdict: str
    how: str
    seconds: float
    point: Tensor | None = None


def margins(layers: Sequence[Affine], x: Tensor, y: int) -> Tensor:
    """The lead of the logit of class ``y`` over each other logit, ``[B, classes - 1]``."""
    logits = forward(layers, x)
    others = [k for k in range(logits.shape[1]) if k != y]
    return logits[:, [y]] - logits[:, others]


def lowest(layers: Sequence[Affine], functions: Affine, bounds: Sequence[Box], box: Box) -> Tensor:
    """Lower bounds of linear functions of the last hidden layer over a box, by CROWN's backward pass.

    Args:
        layers: the hidden layers.
        functions: weights and constants, with a row for each function.
        bounds: bounds of the hidden units.
        box: a box of flat images.
    """
    weight, constant = functions
    for (low, high), (matrix, bias) in zip(reversed(bounds), reversed(layers), strict=True):
        slope = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, high / (high - low).clamp(min=1e-300)))
        # A ReLU whose sign is not known lies above 0 and above its input. Take the lower bound of these two that leaves
        # the smaller area.
        below = torch.where((low < 0) & (high > 0), (high > -low).to(slope.dtype), slope)
        shift = torch.where((low < 0) & (high > 0), -low * slope, torch.zeros_like(low))
        constant = constant + weight.clamp(max=0) @ shift
        weight = weight.clamp(min=0) * below + weight.clamp(max=0) * slope
        weight, constant = weight @ matrix, constant + weight @ bias
    middle, radius = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2
    return weight @ middle - weight.abs() @ radius + constant


def hidden_bounds(layers: Sequence[Affine], box: Box) -> list[Box]:
    """Bounds of each hidden unit before its ReLU, over a box of flat images."""
    bounds: list[Box] = []
    for i, (weight, bias) in enumerate(layers[:-1]):
        before = layers[:i]
        low = lowest(before, Affine(weight, bias), bounds, box)
        high = -lowest(before, Affine(-weight, -bias), bounds, box)
        if bounds:
            # Combine CROWN's bounds with interval bounds, since neither are tighter everywhere.
            least, most = (end.relu() for end in bounds[-1])
            middle, radius = weight @ (least + most) / 2 + bias, weight.abs() @ (most - least) / 2
            low, high = torch.maximum(low, middle - radius), torch.minimum(high, middle + radius)
        bounds.append((low, high))
    return bounds


def lead(layers: Sequence[Affine], y: int) -> Affine:
    """The margins of class ``y`` as linear functions of the last hidden layer."""
    weight, bias = layers[-1]
    others = [k for k in range(len(bias)) if k != y]
    return Affine(weight[y] - weight[others], bias[y] - bias[others])


def search(layers: Sequence[Affine], box: Box, y: int) -> Tensor | None:
    """Search a misclassified point of the box by signed steps from random points; return None without success.

    Args:
        layers: the network's layers.
        box: a box of flat images.
        y: the right class.
    """
    low, high = box
    generator = torch.Generator().manual_seed(0)
    point = low + (high - low) * torch.rand(STARTS, len(low), generator=generator, dtype=low.dtype)
    for step in range(STEPS):
        point = point.detach().requires_grad_()
        least = margins(layers, point, y).min(1).values
        if least.min() <= -TOLERANCE:
            return point[least.argmin()].detach()
        gradient = torch.autograd.grad(least.sum(), point)[0]
        point = (point - (high - low) * 0.3 * (1 - step / STEPS) * gradient.sign()).clamp(low, high)
    return None


class Program:
    """The network's hidden layers over a box as linear constraints, in which some variables are 0 or 1.

    Every hidden unit is a - s: a is its part above 0, s its part below 0. If its sign is not known, a variable that is
    0 or 1 allows only one of the two. Units that are never above 0 are left out.

    Args:
        box: a box of flat images.
    """

    def __init__(self, box: Box):
        self.lower, self.upper = (end.numpy() for end in box)
        self.whole = np.zeros(len(self.lower))
        self.rows = LinearConstraint(sparse.csr_matrix((0, len(self.lower))), [], [])
        #: The columns of the last layer's units, and the numbers of these units. Units that are never above 0 are left
        #: out.
        self.columns = self.kept = np.arange(len(self.lower))

    def add(self, layer: Affine, low: Tensor, high: Tensor) -> None:
        """Add the next hidden layer.

        Args:
            layer: weights of the layer.
            low: lower bounds of its units before their ReLU.
            high: their upper bounds.
        """
        alive = np.flatnonzero(high > 0)
        least, most = low.numpy()[alive], high.numpy()[alive]
        weight, bias = layer.weight.numpy()[np.ix_(alive, self.kept)], layer.bias.numpy()[alive]
        unsure = np.flatnonzero(least < 0)
        a = self._new(np.maximum(least, 0), most)
        s = self._new(np.zeros(len(unsure)), -least[unsure])
        d = self._new(np.zeros(len(unsure)), np.ones(len(unsure)), whole=1)
        one = np.eye(len(alive))
        self._hold([(self.columns, weight), (a, -one), (s, one[:, unsure])], -bias, -bias)
        one, free = np.eye(len(unsure)), np.full(len(unsure), -np.inf)
        self._hold([(a[unsure], one), (d, -np.diag(most[unsure]))], free, np.zeros(len(unsure)))
        self._hold([(s, one), (d, -np.diag(least[unsure]))], free, -least[unsure])
        self.columns, self.kept = a, alive

    def _new(self, lower: np.ndarray, upper: np.ndarray, whole: int = 0) -> np.ndarray:
        """The columns of new variables."""
        first = len(self.lower)
        self.lower, self.upper = np.append(self.lower, lower), np.append(self.upper, upper)
        self.whole = np.append(self.whole, np.full(len(lower), whole))
        return np.arange(first, first + len(lower))

    def _hold(self, terms: list[tuple[np.ndarray, np.ndarray]], low: np.ndarray, high: np.ndarray) -> None:
        """Constraints: a sum of matrices times variables lies between two vectors."""
        rows = np.zeros((len(low), len(self.lower)))
        for columns, matrix in terms:
            rows[:, columns] += matrix
        before = self.rows
        wide = sparse.csr_matrix((before.A.data, before.A.indices, before.A.indptr), (before.A.shape[0], rows.shape[1]))
        self.rows = LinearConstraint(
            sparse.vstack([wide, sparse.csr_matrix(rows)], format="csr"),
            np.append(before.lb, low),
            np.append(before.ub, high),
        )

    def minimize(self, weight: Tensor, seconds: float, most: float | None = None, relaxed: bool = False) -> Any:
        """Minimize a linear function of the last layer, or find where it is small enough.

        Args:
            weight: weights of the function.
            seconds: time limit.
            most: accept any point at which the function is at most this value. None minimizes the function.
            relaxed: whether the variables that are 0 or 1 may lie between, which gives a bound quickly.

        Returns:
            The result of `scipy.optimize.milp`.
        """
        cost = np.zeros(len(self.lower))
        cost[self.columns] = weight.numpy()[self.kept]
        rows = [self.rows] if most is None else [self.rows, LinearConstraint(cost[None], -np.inf, most)]
        return milp(
            cost if most is None else 0 * cost,
            integrality=0 * self.whole if relaxed else self.whole,
            constraints=rows,
            bounds=Bounds(self.lower, self.upper),
            options={"time_limit": max(seconds, 1e-3)},
        )


def tightened(layers: Sequence[Affine], bounds: list[Box], box: Box, until: float) -> Program:
    """The program of all hidden layers; the relaxed program bounds the units whose sign CROWN leaves open.

    Args:
        layers: the network's layers.
        bounds: bounds of the hidden units, which are tightened in place.
        box: a box of flat images.
        until: time limit on the clock of ``time.monotonic``; the program then keeps the bounds that it has.
    """
    program = Program(box)
    for i, (layer, (low, high)) in enumerate(zip(layers, bounds, strict=False)):
        for unit in torch.nonzero((low < 0) & (high > 0)).flatten() if i else ():
            for end, sign in ((low, 1.0), (high, -1.0)):
                if low[unit] < 0 < high[unit]:
                    found = program.minimize(sign * layer.weight[unit], until - time.monotonic(), relaxed=True)
                    if found.status == OPTIMAL:
                        bound = found.fun + sign * float(layer.bias[unit]) - SLACK
                        end[unit] = max(float(end[unit]), bound) if sign > 0 else min(float(end[unit]), -bound)
        program.add(layer, low, high)
    return program


def decide(layers: Sequence[Affine], x: Tensor, y: int, eps: float, seconds: float = 30.0) -> Decision:
    """Decide whether any image within ``eps`` of ``x`` and within [0, 1] is classified otherwise than ``y``.

    Args:
        layers: the network's layers.
        x: an image, which the network classifies as ``y``.
        y: its class.
        eps: the L-inf radius.
        seconds: about the longest time of the program; an image that takes more is undecided.
    """
    begin, flat = time.process_time(), x.double().flatten()
    box = (flat - eps).clamp(0, 1), (flat + eps).clamp(0, 1)

    def decided(verdict: str, how: str, point: Tensor | None = None) -> Decision:
        return Decision(verdict, how, time.process_time() - begin, point)

    bounds, ahead = hidden_bounds(layers, box), lead(layers, y)
    least = lowest(layers[:-1], ahead, bounds, box)
    if least.min() > TOLERANCE:
        return decided(ROBUST, BOUND)
    point = search(layers, box, y)
    if point is not None:
        return decided(FALLS, POINT, point)
    until, proved = time.monotonic() + seconds, True
    program = tightened(layers, bounds, box, until)
    for other in least.argsort()[: int((least <= TOLERANCE).sum())]:
        weight, bias = ahead.weight[other], float(ahead.bias[other])
        # First accept any point that fools the network. If the solver's point hardly fools the network, minimize the
        # margin.
        for most in (TOLERANCE - bias, None):
            found = program.minimize(weight, until - time.monotonic(), most)
            if found.status == INFEASIBLE:
                break
            if found.x is not None:
                tried = torch.from_numpy(found.x[: len(flat)]).clamp(*box)
                least_margin = float(margins(layers, tried[None], y).min())
                if least_margin <= -TOLERANCE:
                    return decided(FALLS, MILP, tried)
                point = tried if least_margin <= 0 else point
        else:
            proved &= found.status == OPTIMAL and found.mip_dual_bound + bias > TOLERANCE
    if point is not None:
        return decided(FALLS, MILP, point)
    return decided(ROBUST if proved else UNDECIDED, MILP)
