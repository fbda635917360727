from importlib import import_module

import pytest
import torch
from torch import Tensor

from purify_fast.ops import hyperplane_projection

pytestmark = pytest.mark.interpreter

op = import_module("purify_fast.ops.hyperplane_projection")
NORMS = op.NORMS


def inputs(*shape: int, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Planes nearby and far away, on either side, some out of reach."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    w[torch.rand(shape, generator=generator) < 0.1] = 0
    w = w.to(dtype)
    flat = w.double().flatten(1)
    share = 1.2 * torch.rand(shape[0], generator=generator, dtype=torch.float64) - 0.6
    b = (flat * x.double().flatten(1)).sum(1) + share * flat.abs().sum(1)
    return x, w, b.to(torch.promote_types(dtype, torch.float32))


def bisected(x: Tensor, w: Tensor, b: Tensor, norm: str) -> Tensor:
    """The moves in float64 by halving the interval of t until it has no number inside, on the box [0, 1]."""
    w = torch.where(w.isfinite(), w, 0.0)
    gap = (b - (w * x).sum(1))[:, None]
    sign, slope, gap = torch.where(gap < 0, -w.sign(), w.sign()), w.abs(), gap.abs()
    room = torch.where(sign > 0, 1 - x, torch.where(sign < 0, x, 0.0))

    def size(t: Tensor) -> Tensor:
        # of l1, t counts down from the largest slope
        if norm == "l1":
            return torch.where(slope > slope.amax(1, keepdim=True) - t, room, 0.0)
        return torch.minimum(t if norm == "linf" else t * slope, room)

    low, high = torch.zeros_like(gap), torch.full_like(gap, 1.0 if norm == "linf" else 1e12)
    if norm == "l1":
        high = slope.amax(1, keepdim=True) + 1
    for _ in range(200):
        middle = (low + high) / 2
        enough = (slope * size(middle)).sum(1, keepdim=True) >= gap
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    move = size(high)
    if norm == "l1":
        # what the last coordinates bring too much is taken back from them, in equal shares of their room
        less = size(low)
        last = move - less
        part = (gap - (slope * less).sum(1, keepdim=True)) / (slope * last).sum(1, keepdim=True)
        move = less + last * part.nan_to_num(1.0).clamp(0, 1)
    return sign * move


def many_rows(rows: int = 10_000, size: int = 30) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random rows in float64, a thousand of each kind that is degenerate; and which have a plane to reach."""
    x, w, b = inputs(rows, size, dtype=torch.float64)
    distance = b - (w * x).sum(1)
    kind = torch.arange(rows) % 10
    w[kind == 0] = 0.0
    x[kind == 1] = x[kind == 1].round()
    x[:, ::2][kind == 2] = x[:, ::2][kind == 2].round()
    w[kind == 3] = w[kind == 3].sign()
    # the box stops every coordinate
    x[kind == 4] = (w * distance[:, None] > 0).double()[kind == 4]
    w[:, 3][kind == 5], w[:, 4][kind == 5] = torch.nan, -torch.inf
    b = torch.where(w.isfinite(), w, 0.0).mul(x).sum(1) + distance
    b[kind == 6] = (w * x).sum(1)[kind == 6]
    b[kind == 7] *= 100
    return x, w, b, kind


@pytest.mark.parametrize("norm", NORMS)
def test_ten_thousand_rows_by_bisection(backend, norm):
    x, w, b, kind = many_rows()
    got, wanted = hyperplane_projection(x, w, b, norm), bisected(x, w, b, norm)
    assert (got - wanted).abs().max() <= 1e-9 and (got[(kind == 0) | (kind == 4) | (kind == 6)].abs() <= 1e-12).all()
    w = torch.where(w.isfinite(), w, 0.0)
    most = torch.where(w * (b - (w * x).sum(1))[:, None] > 0, 1 - x, x).mul(w.abs()).sum(1)
    meets = (b - (w * x).sum(1)).abs() <= most
    assert 4000 < meets.sum() < 8000 and ((w * (x + got)).sum(1) - b)[meets].abs().max() <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_any_size(backend, norm, dtype):
    """All coordinates alike go halfway; a power of two that scales w and b changes no bit."""
    x = torch.full((5, 8), 0.5, dtype=dtype)
    w = torch.tensor([1e-42, 1e-30, 1.0, 1e30, 1e37], dtype=dtype)[:, None].expand(5, 8)
    move = hyperplane_projection(x, w, 6 * w[:, 0], norm)
    torch.testing.assert_close(move, torch.full_like(x, 0.25), rtol=0, atol=2e-3 if dtype == torch.float32 else 1e-9)
    x, w, b = inputs(6, 40, dtype=dtype)
    assert torch.equal(hyperplane_projection(x, w * 2**-40, b * 2**-40, norm), hyperplane_projection(x, w, b, norm))


@pytest.mark.parametrize("norm", NORMS)
def test_rows_without_a_plane_do_not_move(backend, norm):
    x, w, b = inputs(5, 12)
    x[0, 3], b[1], w[2], b[3] = torch.nan, torch.nan, 0.0, torch.inf
    got = hyperplane_projection(x, w, b, norm)
    assert (got[:3] == 0).all() and got.isfinite().all()
    corner = torch.where(w[3] > 0, 1 - x[3], torch.where(w[3] < 0, -x[3], 0.0))
    torch.testing.assert_close(got[3], corner)


@pytest.mark.parametrize("norm", NORMS)
def test_another_box_and_one_number(backend, norm):
    x, w, _ = inputs(3, 4, 9, 7)
    each = hyperplane_projection(x, w, torch.full((3,), 2.0), norm, -1.0, 3.0)
    assert torch.equal(hyperplane_projection(x, w, 2.0, norm, -1.0, 3.0), each)
    moved = hyperplane_projection(4 * x - 1, w, 0.0, norm, -1.0, 3.0)
    unit = hyperplane_projection(x, w, (w.flatten(1).sum(1)) / 4, norm)
    torch.testing.assert_close(moved, 4 * unit, rtol=0, atol=1e-4)
