"""The exact answer for small ReLU networks: whether an L-inf ball contains a misclassified point, by HiGHS.

No attack of the package takes part. The program is that of Tjeng et al. (ICLR 2019, arXiv 1711.07356).
"""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def falls(layers, x, y: int, eps: float) -> bool:
    """Tell whether a point of the ball, limited to [0, 1], has a logit of another class above that of class ``y``."""
    *hidden, last = [(layer.weight.numpy(), layer.bias.numpy()) for layer in layers]
    flat = x.double().flatten().numpy()
    sizes = [len(flat), *(len(bias) for _, bias in hidden)]
    # The variables: the pixels, then the units of each hidden layer, then a binary variable for each unit.
    first = np.cumsum([0, *sizes])
    values, units = first[-1], first[-1] - sizes[0]
    lower, upper = [(flat - eps).clip(0, 1)], [(flat + eps).clip(0, 1)]
    rows, ends = [np.zeros((0, values + units))], [np.zeros(0)]
    for i, (weight, bias) in enumerate(hidden):
        middle, radius = weight @ (lower[-1] + upper[-1]) / 2 + bias, np.abs(weight) @ (upper[-1] - lower[-1]) / 2
        least, most = middle - radius, middle + radius
        before, here = slice(first[i], first[i + 1]), slice(first[i + 1], first[i + 2])
        binary = slice(here.start + units, here.stop + units)
        # A unit is at least its sum. It is at most its sum if its binary variable is 1, and else at most 0.
        at_least, at_most, off = np.zeros((3, len(bias), values + units))
        at_least[:, here], at_least[:, before] = np.eye(len(bias)), -weight
        at_most[:, here], at_most[:, before], at_most[:, binary] = -np.eye(len(bias)), weight, np.diag(least)
        off[:, here], off[:, binary] = -np.eye(len(bias)), np.diag(most)
        rows += [at_least, at_most, off]
        ends += [bias, least - bias, np.zeros(len(bias))]
        lower.append(least.clip(0))
        upper.append(most.clip(0))
    box = Bounds(np.concatenate([*lower, np.zeros(units)]), np.concatenate([*upper, np.ones(units)]))
    held = LinearConstraint(np.concatenate(rows), np.concatenate(ends), np.inf)
    whole = np.repeat([0, 1], [values, units])
    weight, bias = last
    for other in set(range(len(bias))) - {y}:
        cost = np.zeros(values + units)
        cost[values - sizes[-1] : values] = weight[y] - weight[other]
        found = milp(cost, integrality=whole, constraints=held, bounds=box)
        assert found.status == 0, found.message
        margin = found.fun + bias[y] - bias[other]
        # HiGHS is exact up to 1e-6.
        assert abs(margin) > 1e-5
        if margin < 0:
            return True
    return False
