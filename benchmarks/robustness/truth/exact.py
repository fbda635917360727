"""Decide exactly, in float64, whether an L-inf ball contains an adversarial example for a small ReLU network.

There are three steps, each for images that the steps before it did not decide.

1. Bounds that hold for the whole ball may prove that all its points are classified correctly.
2. Signed gradient steps from random points may find a misclassified point of the ball.
3. For each class that the bounds did not exclude, a mixed-integer program finds a point whose logit of this class is
   above that of the correct class, or proves that the ball has no such point.

No attack of the package is used. The bounds are those of CROWN (Zhang et al., NeurIPS 2018, arXiv 1811.00866). The
program is that of Tjeng et al. (ICLR 2019, arXiv 1711.07356). It is solved by HiGHS.
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

from .relu_layers import Affine, forward

#: The margin of a point is the logit of the correct class minus the highest other logit. A lower bound of the margin is
#: a proof only if it is above TOLERANCE, because HiGHS satisfies constraints only up to 1e-6. A point with a margin
#: between -TOLERANCE and 0 may be classified correctly in float32. Therefore, if such a point was found, the search for
#: a point with a lower margin continues.
TOLERANCE = 1e-5
#: A bound that HiGHS computes is made looser by this amount, because of rounding.
SLACK = 1e-6
#: The statuses of `scipy.optimize.milp` for an optimal solution, and for the proof that there is no solution.
OPTIMAL, INFEASIBLE = 0, 2
#: The search for a misclassified point takes STEPS steps from each of STARTS random starts.
STARTS, STEPS = 5, 40
ROBUST, FALLS, UNDECIDED = "robust", "falls", "undecided"
BOUND, POINT, MILP = "bound", "point", "milp"


#: The lowest and the highest value of each pixel or unit, as two flat tensors in float64.
Box = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Decision:
    """The decision on an image.

    Args:
        verdict: `ROBUST`, `FALLS` (if there is an adversarial example), or `UNDECIDED`.
        how: the last step that was tried: `BOUND`, `POINT` or `MILP`.
        point: adversarial example, flat, float64. It is None if no adversarial example was found.
    """

    verdict: str
    how: str
    point: Tensor | None = None


def margins(layers: Sequence[Affine], x: Tensor, y: int) -> Tensor:
    """Return the logit of class ``y`` minus each other logit, ``[B, classes - 1]``."""
    logits = forward(layers, x)
    others = [k for k in range(logits.shape[1]) if k != y]
    return logits[:, [y]] - logits[:, others]


def lowest(layers: Sequence[Affine], functions: Affine, bounds: Sequence[Box], box: Box) -> Tensor:
    """Compute lower bounds of linear functions of the last hidden layer over a box, by CROWN's backward pass.

    Args:
        layers: hidden layers of the network.
        functions: weights and constants of the functions, with a row for each function.
        bounds: bounds of the hidden units before their ReLU.
        box: box of flat images.
    """
    weight, constant = functions
    for (low, high), (matrix, bias) in zip(reversed(bounds), reversed(layers), strict=True):
        slope = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, high / (high - low).clamp(min=1e-300)))
        # If the sign of a unit is not known, both 0 and the unit's input are lower bounds of the ReLU. Use the lower
        # bound that has the smaller area between itself and the upper bound.
        below = torch.where((low < 0) & (high > 0), (high > -low).to(slope.dtype), slope)
        shift = torch.where((low < 0) & (high > 0), -low * slope, torch.zeros_like(low))
        constant = constant + weight.clamp(max=0) @ shift
        weight = weight.clamp(min=0) * below + weight.clamp(max=0) * slope
        weight, constant = weight @ matrix, constant + weight @ bias
    middle, radius = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2
    return weight @ middle - weight.abs() @ radius + constant


def hidden_bounds(layers: Sequence[Affine], box: Box) -> list[Box]:
    """Return bounds of all hidden units before their ReLU, over a box of flat images."""
    bounds: list[Box] = []
    for i, (weight, bias) in enumerate(layers[:-1]):
        before = layers[:i]
        low = lowest(before, Affine(weight, bias), bounds, box)
        high = -lowest(before, Affine(-weight, -bias), bounds, box)
        if bounds:
            # Combine CROWN's bounds with interval bounds, because for some units the interval bounds are tighter.
            least, most = (end.relu() for end in bounds[-1])
            middle, radius = weight @ (least + most) / 2 + bias, weight.abs() @ (most - least) / 2
            low, high = torch.maximum(low, middle - radius), torch.minimum(high, middle + radius)
        bounds.append((low, high))
    return bounds


def lead(layers: Sequence[Affine], y: int) -> Affine:
    """Return the margins of class ``y`` as linear functions of the last hidden layer."""
    weight, bias = layers[-1]
    others = [k for k in range(len(bias)) if k != y]
    return Affine(weight[y] - weight[others], bias[y] - bias[others])


def search(layers: Sequence[Affine], box: Box, y: int) -> Tensor | None:
    """Search for a misclassified point of a box, by signed gradient steps from random points.

    Args:
        layers: layers of the network.
        box: box of flat images.
        y: correct class.

    Returns:
        A misclassified point, flat, or None if none was found.
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
    """A mixed-integer program. Its linear constraints describe the hidden layers of a network for the images of a box.

    The value of a hidden unit before its ReLU is a - s, where a is its positive part and s its negative part. If the
    sign of the unit is not known, a binary variable allows only one of the two parts to be above 0. Units that are
    never above 0 are left out.

    Args:
        box: box of flat images.
    """

    def __init__(self, box: Box):
        self.lower, self.upper = (end.numpy() for end in box)
        self.whole = np.zeros(len(self.lower))
        self.rows = LinearConstraint(sparse.csr_matrix((0, len(self.lower))), [], [])
        #: The program has only some units of the last added layer. `kept` are the indices of these units in the layer,
        #: and `columns` are the indices of their variables in the program. Before the first layer is added, the units
        #: are the pixels.
        self.columns = self.kept = np.arange(len(self.lower))

    def add(self, layer: Affine, low: Tensor, high: Tensor) -> None:
        """Add the next hidden layer.

        Args:
            layer: weights and biases of the layer.
            low: lower bounds of the units before their ReLU.
            high: upper bounds of the units before their ReLU.
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
        """Add variables between two bounds, and return their columns. ``whole`` is 1 for integer variables."""
        first = len(self.lower)
        self.lower, self.upper = np.append(self.lower, lower), np.append(self.upper, upper)
        self.whole = np.append(self.whole, np.full(len(lower), whole))
        return np.arange(first, first + len(lower))

    def _hold(self, terms: list[tuple[np.ndarray, np.ndarray]], low: np.ndarray, high: np.ndarray) -> None:
        """Add linear constraints.

        Args:
            terms: pairs of columns and a matrix. Each matrix is multiplied by the variables in its columns. The
                constraints bound the sum of these products.
            low: lower bounds of the sum.
            high: upper bounds of the sum.
        """
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
        """Minimize a linear function of the last layer, or find a point at which it is small enough.

        Args:
            weight: weights of the function.
            seconds: time limit in seconds.
            most: value that is small enough. If it is None, the function is minimized.
            relaxed: True to allow values between 0 and 1 for binary variables, which gives a bound quickly.

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
    """Make the mixed-integer linear program of all hidden layers; tighten ``bounds`` by its linear relaxation.

    Args:
        layers: layers of the network.
        bounds: bounds of the hidden units, which are improved in place.
        box: box of flat images.
        until: time on the clock of ``time.monotonic`` at which the improvement of bounds ends.
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
    """Decide whether the ball around an image, limited to [0, 1], contains an adversarial example.

    Args:
        layers: layers of the network.
        x: image that the network classifies correctly.
        y: class of the image.
        eps: L-inf radius on images in [0, 1].
        seconds: approximate time limit of the program. An image that needs more time is undecided.
    """
    flat = x.double().flatten()
    box = (flat - eps).clamp(0, 1), (flat + eps).clamp(0, 1)

    bounds, ahead = hidden_bounds(layers, box), lead(layers, y)
    least = lowest(layers[:-1], ahead, bounds, box)
    if least.min() > TOLERANCE:
        return Decision(ROBUST, BOUND)
    point = search(layers, box, y)
    if point is not None:
        return Decision(FALLS, POINT, point)
    until, proved = time.monotonic() + seconds, True
    program = tightened(layers, bounds, box, until)
    for other in least.argsort()[: int((least <= TOLERANCE).sum())]:
        weight, bias = ahead.weight[other], float(ahead.bias[other])
        # First find any point with a small enough margin. Minimize the margin only if it is not clearly below 0.
        for most in (TOLERANCE - bias, None):
            found = program.minimize(weight, until - time.monotonic(), most)
            if found.status == INFEASIBLE:
                break
            if found.x is not None:
                tried = torch.from_numpy(found.x[: len(flat)]).clamp(*box)
                least_margin = float(margins(layers, tried[None], y).min())
                if least_margin <= -TOLERANCE:
                    return Decision(FALLS, MILP, tried)
                point = tried if least_margin <= 0 else point
        else:
            proved &= found.status == OPTIMAL and found.mip_dual_bound + bias > TOLERANCE
    if point is not None:
        return Decision(FALLS, MILP, point)
    return Decision(ROBUST if proved else UNDECIDED, MILP)
