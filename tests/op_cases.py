"""Cases of tests of operations."""

import math

import torch
from torch.utils._pytree import tree_map_only

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def doubled(arguments):
    """The arguments of an op with its floating-point tensors, also those in lists, in float64."""
    return tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, list(arguments))


def cases(shapes, *ragged):
    """Pairs of a shape and a dtype: float32 with all shapes, the others with empty shapes and those named."""
    assert set(ragged) <= set(shapes)
    others = [shape for shape in shapes if shape in ragged or not math.prod(shape)]
    return [(shape, dtype) for dtype in DTYPES for shape in (shapes if dtype == torch.float32 else others)]


def by_threads(call):
    """What a function returns with one thread, two and three."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def points(*shape, dtype=torch.float32, seed=0):
    """x, grad, x_nat and the point before of a step: a little outside the ball, so that every branch is taken."""
    generator = torch.Generator().manual_seed(seed)
    nat, first, second = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    x, previous = ((nat + 0.2 * (moved - 0.5)).clamp(0, 1) for moved in (first, second))
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad[torch.rand(shape, generator=generator) < 0.1] = 0
    return tuple(t.to(dtype) for t in (x, grad, nat, previous))


def radii(batch):
    return torch.linspace(0.01, 0.05, batch), torch.linspace(0.02, 0.12, batch)
