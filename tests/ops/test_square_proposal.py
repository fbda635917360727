from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from purify_fast.attacks.square import pattern
from purify_fast.ops import square_proposal

op = import_module("purify_fast.ops.square_proposal")
NORMS = op.NORMS
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_ball_and_box_and_no_mutation(norm, dtype):
    x, clean, eps, numbers, edge, _, _, _, shapes = inputs(norm, dtype=dtype)
    radius, given = 30 * eps, (x.clone(), clean.clone(), numbers.clone())
    found = square_proposal(x, clean, radius, numbers, edge, norm, 0.4, 0.6, shapes).double()
    slack = 4 * torch.finfo(dtype).eps
    assert (found >= 0.4 - slack).all() and (found <= 0.6 + slack).all()
    reach = (found.unflatten(0, (2, 4)) - clean.double()).flatten(2).norm(p=POWERS[norm], dim=2)
    assert (reach <= radius * (1 + 1e-5) + slack * 360 ** (1 / POWERS[norm])).all()
    assert all(torch.equal(now, before) for now, before in zip((x, clean, numbers), given, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_any_layout_batch_and_radius(norm):
    x, clean, eps, numbers, *rest = inputs(norm, draws=3)
    whole = square_proposal(x, clean, eps, numbers, *rest).unflatten(0, (3, 4))
    for b in range(4):
        for t in range(3):
            alone = x[b : b + 1], clean[b : b + 1], float(eps[b]), numbers[b : b + 1, t : t + 1]
            assert torch.equal(square_proposal(*alone, *rest)[0], whole[t, b])
    last = [image.to(memory_format=torch.channels_last) for image in (x, clean)]
    strided = numbers.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(square_proposal(*last, eps, strided, *rest).unflatten(0, (3, 4)), whole)
    assert square_proposal(x[:0], clean[:0], eps[:0], numbers[:0], *rest).shape == (0, 3, 10, 12)


def opaque(norm: str, *given) -> tuple:
    """The arguments as the op takes them."""
    x, clean, eps, numbers, edge, _, lo, hi, shapes = inputs(norm, *given)
    return x, clean, eps, numbers, shapes, edge, NORMS.index(norm), lo, hi


@pytest.mark.parametrize("norm", NORMS)
def test_contract(contract, norm):
    contract.registered(op.OP.handle, opaque(norm), opaque(norm, (0, 3, 8, 8)), opaque(norm, (2, 1, 5, 5), 1))
    x, *rest = inputs(norm)
    assert not square_proposal(x.requires_grad_(), *rest).requires_grad
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(square_proposal(x, *rest), square_proposal(*inputs(norm)))


@pytest.mark.parametrize("norm", NORMS)
def test_compiles(contract, norm):
    def make(size: int) -> tuple:
        return inputs(norm, (size, 3, 10, 12))[:4]

    rest = inputs(norm)[4:]
    # the first size is not the edge's, which would be taken for it
    contract.compiles(lambda *given: square_proposal(*given, *rest), make, (6, 8, 13), compiler="aot_eager")


@pytest.mark.parametrize(
    ("norm", "change", "message"),
    [
        ("linf", {"x": torch.zeros(2, 3, 8), "x_nat": torch.zeros(2, 3, 8)}, r"x must be images \[B, C, H, W\], got"),
        ("linf", {"x_nat": torch.zeros(2, 3, 8, 9)}, r"x and x_nat need one shape \[B, ...\]"),
        ("linf", {"numbers": torch.zeros(2, 8)}, r"float32 \[B, T, 5 \+ C\] = \[2, T, 8\], got torch.float32 \[2, 8\]"),
        ("linf", {"numbers": torch.zeros(2, 1, 8).double()}, "numbers must be float32"),
        ("linf", {"numbers": torch.zeros(2, 1, 8, device="meta")}, "numbers are on meta, x on cpu: they must agree"),
        ("linf", {"edge": 9}, "edge must be from 1 to 8 in images of 8 x 8, got 9"),
        ("linf", {"edge": 0}, "edge must be from 1 to 8"),
        ("linf", {"pattern": torch.zeros(2, 3, 3)}, "pattern must be None for the norm linf"),
        ("l2", {}, r"pattern must be float32 \[2, edge, edge\] = \[2, 3, 3\] for l2, got None"),
        ("l1", {"pattern": torch.zeros(2, 9)}, r"for l1, got torch.float32 \[2, 9\]"),
        ("l1", {"pattern": torch.zeros(2, 3, 3, device="meta")}, "pattern is on meta, x on cpu: they must agree"),
        ("l3", {}, "norm must be one of linf, l2, l1, got 'l3'"),
        ("linf", {"lo": 1.0, "hi": 0.5}, "lo = 1.0 is above hi = 0.5"),
        ("linf", {"eps": torch.zeros(3)}, r"eps must be a number or a tensor \[B\] = \[2\], got \[3\]"),
    ],
)
def test_errors(norm, change, message):
    images = {"x": torch.zeros(2, 3, 8, 8), "x_nat": torch.zeros(2, 3, 8, 8)}
    arguments = {**images, "eps": 0.1, "numbers": torch.zeros(2, 1, 8), "edge": 3, "norm": norm}
    with pytest.raises(ValueError, match=message):
        square_proposal(**(arguments | change))
