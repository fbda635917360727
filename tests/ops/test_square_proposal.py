from importlib import import_module

import pytest
import torch
from op_cases import DTYPES
from torch import Tensor

from purify_fast.judge.searches.square import pattern
from purify_fast.ops import square_proposal

op = import_module("purify_fast.ops.square_proposal")
NORMS = op.NORMS
POWERS = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
CPU = torch.device("cpu")


def inputs(norm: str, shape=(4, 3, 10, 12), draws: int = 2, edge: int = 5, dtype=torch.float32, share: float = 0.6):
    """Points that use a share of their radii, in the middle of the box; and what proposals of them are made of."""
    generator = torch.Generator().manual_seed(1)
    clean, offset = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    clean, offset = 0.45 + 0.1 * clean, 0.02 * (offset - 0.5)
    eps = offset.flatten(1).norm(p=POWERS[norm], dim=1) / share
    numbers = torch.rand(shape[0], draws, 5 + shape[1], generator=generator)
    shapes = None if norm == "linf" else pattern(edge, norm, CPU)
    return (clean + offset).to(dtype), clean.to(dtype), eps.float(), numbers, edge, norm, 0.0, 1.0, shapes


def windows(numbers: Tensor, edge: int, height: int, width: int) -> list[tuple[slice, slice]]:
    """W and V of one proposal."""
    first = [int(place * (size - edge + 1)) for place, size in zip(numbers[:4], (height, width) * 2, strict=True)]
    return [(slice(a, a + edge), slice(b, b + edge)) for a, b in (first[:2], first[2:])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linf_by_hand(dtype):
    x, clean, eps, numbers, *rest = inputs("linf", dtype=dtype)
    found = square_proposal(x, clean, 40 * eps, numbers, *rest)
    assert found.dtype == dtype and found.is_contiguous()
    for t in range(2):
        for b in range(4):
            wanted, (rows, columns) = x[b].clone(), windows(numbers[b, t], 5, 10, 12)[0]
            for c in range(3):
                sign = -1 if numbers[b, t, 5 + c] < 0.5 else 1
                moved = clean[b, c, rows, columns].to(torch.promote_types(dtype, torch.float32)) + 40 * eps[b] * sign
                wanted[c, rows, columns] = moved.clamp(0, 1).to(dtype)
            assert torch.equal(found.unflatten(0, (2, 4))[t, b], wanted)
    assert found.min() == 0 or found.max() == 1, "the box was not reached"


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_mass_moves_between_the_windows_and_the_rest_is_used(norm):
    x, clean, eps, numbers, *rest = inputs(norm, dtype=torch.float64)
    found = square_proposal(x, clean, eps, numbers, *rest).unflatten(0, (2, 4))
    power = POWERS[norm]
    assert torch.allclose((found - clean).flatten(2).norm(p=power, dim=2), eps.double().expand(2, 4), rtol=1e-6)
    for t in range(2):
        for b in range(4):
            one, two = windows(numbers[b, t], 5, 10, 12)
            before, after = x[b] - clean[b], found[t, b] - clean[b]
            inside, other = torch.zeros(2, 10, 12, dtype=torch.bool).unbind(0)
            inside[one], other[two] = True, True
            # nothing but the windows changes, and V is emptied
            torch.testing.assert_close(after[:, ~(inside | other)], before[:, ~(inside | other)])
            assert (after[:, other & ~inside].abs() < 1e-15).all()
            unused = eps[b].double() ** power - before.abs().pow(power).sum()
            for c in range(3):
                wanted = unused / 3 + before[c, inside | other].abs().pow(power).sum()
                torch.testing.assert_close(after[c, inside].abs().pow(power).sum(), wanted)
                # the pattern and what was there, each of length 1
                shape = rest[-1][int(numbers[b, t, 4] < 0.5)].double() * (-1 if numbers[b, t, 5 + c] < 0.5 else 1)
                mixed = shape + before[c][one] / before[c][one].norm(p=power)
                torch.testing.assert_close(after[c][one] / after[c][one].norm(p=power), mixed / mixed.norm(p=power))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_an_edge_in_a_tensor_gives_the_same_bits(norm, dtype):
    """The pattern may be larger than the windows, as in a step that is captured for every edge."""
    x, clean, eps, numbers, edge, *rest, shapes = inputs(norm, dtype=dtype)
    larger = None if shapes is None else torch.nn.functional.pad(shapes, (0, 4, 0, 4), value=torch.nan)
    wanted = square_proposal(x, clean, eps, numbers, edge, *rest, shapes)
    for number in (edge, edge - 1):
        found = square_proposal(x, clean, eps, numbers, torch.tensor(number), *rest, larger)
        assert torch.equal(found, wanted) == (number == edge)
