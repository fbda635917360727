"""Square's proposals in l2 and l1: how often a program reads its image, and that no proposal leaves the ball."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from purify_fast.judge.searches.square import pattern
from purify_fast.kernels import square_proposal as kernel

op = import_module("purify_fast.ops.square_proposal")
NORMS = ("linf", "l2", "l1")
POWERS = {"l2": 2, "l1": 1}
#: An image that a program holds, and one that it reads in tiles.
SHAPES = {"held": (3, 12, 10), "read again": (1, 72, 72)}


def arguments(norm: str, shape, of_radius: float, box=(-9.0, 9.0), draws: int = 2, edge: int = 3, decades: float = 0):
    """Two images whose offsets have a share of the radius as their norm, over some decades; and their proposals."""
    generator = torch.Generator().manual_seed(1)
    clean, offset, small = (torch.rand(2, *shape, generator=generator) for _ in range(3))
    clean, offset = 0.4 + 0.2 * clean, (offset - 0.5) * 10 ** (-decades * small)
    radius = offset.flatten(1).norm(p=POWERS[norm], dim=1) / of_radius
    numbers = torch.rand(2, draws, 5 + shape[0], generator=generator)
    shapes = pattern(edge, norm, torch.device("cpu"))
    return clean + offset, clean, radius, numbers, shapes, torch.tensor(edge), NORMS.index(norm), *box


def in_float64(given: tuple) -> Tensor:
    x, clean, radius, *rest = given
    return op.reference(x.double(), clean.double(), radius.double(), *rest)


def norms(points: Tensor, given: tuple, norm: str) -> Tensor:
    """The norms of the proposals' offsets, as shares of their radii."""
    offsets = points.double() - given[1].double().repeat(len(points) // 2, 1, 1, 1)
    return offsets.flatten(1).norm(p=POWERS[norm], dim=1) / given[2].double().repeat(len(points) // 2)


@pytest.mark.parametrize("form", ["held", pytest.param("read again", marks=pytest.mark.slow)])
@pytest.mark.parametrize("decades", [0, 6])
@pytest.mark.parametrize("of_radius", [0.3, 0.98, 1.001, 30.0])
@pytest.mark.parametrize("norm", POWERS)
def test_proposals_are_right_and_in_the_ball(norm, of_radius, decades, form):
    """The norms come from sums of parts of the image, in l1 also a shift from few trials: none may lose digits.

    No point is so near to its sphere that the unused part of the radius is rounding, which W would get.
    """
    for box in ((-9.0, 9.0), (0.35, 0.65)):
        given = arguments(norm, SHAPES[form], of_radius, box, draws=1, decades=decades)
        found, same, golden = kernel.forward(*given), op.reference(*given), in_float64(given)
        allowed = 2 * (same - golden).abs().max() + 2 * torch.finfo(torch.float32).eps * golden.abs().max()
        assert (found - golden).abs().max() <= allowed
        longest = norms(found, given, norm).max() - 1
        # A pixel is rounded to its own dtype, which adds to the norm as in the reference.
        assert longest <= max(1e-6, 2 * (norms(same, given, norm).max() - 1)), longest


@pytest.mark.parametrize("form", SHAPES)
def test_a_window_with_all_the_mass(form):
    """All mass is in W, in V or between the two: the norm is that of the ball, whatever the algebra subtracts."""
    x, clean, _radius, numbers, *rest = arguments("l2", SHAPES[form], 1.0, edge=3)
    for first in ((0.0, 0.99), (0.99, 0.0), (0.5, 0.5)):
        offset = 1e-6 * (x - clean)
        offset[:, :, :3, :3] *= 1e6
        numbers[..., :4] = torch.tensor(first).repeat_interleave(2)
        given = clean + offset, clean, offset.flatten(1).norm(dim=1), numbers, *rest
        assert (norms(kernel.forward(*given), given, "l2") - 1).abs().max() < 1e-6
