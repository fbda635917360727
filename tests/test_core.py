"""Properties of csrc/core, through the pybind11 module that CMake builds (`make test-cpp`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from purify_fast import _library
from purify_fast.ops import philox, use_backend
from purify_fast.ops.philox import Stream, words


def holds(*strategies):
    """A property, tried on the same 200 examples every time."""
    return lambda test: settings(max_examples=200, deadline=None, derandomize=True)(given(*strategies)(test))


uint32 = st.integers(0, 2**32 - 1)
int64 = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
EPS = np.finfo(np.float32).eps


def finite(bound: float):
    return st.floats(-bound, bound, width=32, allow_subnormal=True)


def rows(element, shape):
    return arrays(np.float32, shape, elements=element)


shapes = st.tuples(st.integers(1, 9), st.integers(2, 12))


@holds(int64, uint32, uint32, uint32, st.sampled_from(list(Stream)))
def test_philox_words(core, seed, group, draw, sample, stream):
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    assert core.draw_group(0, seed, group, draw, sample, int(stream)) == list(words(key, (group, draw, sample, stream)))


@holds(int64, uint32)
def test_uniform_and_normal_come_from_the_words(core, seed, group):
    word = core.draw_group(0, seed, group, 0, 0, 1)
    uniform = np.array(core.draw_group(1, seed, group, 0, 0, 1), np.uint32).view(np.float32)
    assert (uniform == np.array([w >> 8 for w in word]) * 2.0**-24).all() and (uniform < 1).all()
    normal = np.array(core.draw_group(2, seed, group, 0, 0, 1), np.uint32).view(np.float32)
    u = np.array([(w + 256) >> 8 for w in word]) * 2.0**-24
    v = np.array([w >> 8 for w in word]) * 2.0**-24
    radius = np.sqrt(-2 * np.log(u[[0, 0, 2, 2]]))
    angle = 2 * np.pi * v[[1, 1, 3, 3]]
    truth = radius * np.where([True, False] * 2, np.cos(angle), np.sin(angle))
    assert np.abs(normal - truth).max() < 3e-6  # the angle is rounded to float32


@pytest.mark.skipif(not _library.loaded(), reason="no compiled extension")
def test_normals_have_the_same_bits_for_every_instruction_set(core):
    """The module is compiled for the oldest CPU, the extension runs the clone for this one."""
    with use_backend("cpp"):
        ours = philox(torch.tensor([-5]), torch.arange(50), 400, stream=Stream.LATENT, distribution="normal")
    plain = [[core.draw_group(2, -5, group, 0, sample, 1) for group in range(100)] for sample in range(50)]
    np.testing.assert_array_equal(ours.numpy().view(np.uint32).ravel(), np.array(plain, np.uint32).ravel())


@holds(floats)
def test_elementary_functions(core, x):
    value, wide = np.float32(x), np.float64(np.float32(x))
    pairs = [(core.exp, np.exp), (core.expm1, np.expm1), (core.log, np.log)]
    pairs += [(core.log1p_unit, np.log1p)] if 0 <= x <= 1 else []
    for ours, truth in pairs:
        with np.errstate(all="ignore"):
            got, exact = ours(value), truth(wide)
            wanted = np.float32(exact)
        if not np.isfinite(wanted) or np.isinf(got):
            assert np.isnan(got) if np.isnan(wanted) else max(abs(got), abs(wanted)) == np.inf and exact * got > 0
        else:
            assert abs(got - exact) <= 2 * np.spacing(max(abs(wanted), np.float32(1.2e-38)))


@holds(floats)
def test_sixteen_bit_rounding(core, x):
    value = np.float32(x)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(core.round_half(value), np.float32(np.float16(value)))


def step(core, x, grad, natural, alpha, eps, norm):
    return core.pgd_step(x, grad, natural, alpha, eps, norm, 0.0, 1.0)


images = st.integers(1, 40).flatmap(
    lambda n: st.tuples(rows(st.floats(0, 1, width=32), n), rows(st.floats(0, 1, width=32), n), rows(floats, n))
)
radii = st.floats(0, 1, width=32)


@holds(images, radii, radii, st.sampled_from([0, 1]))
def test_pgd_step_stays_in_the_ball_and_the_box(core, images, alpha, eps, norm):
    x, natural, grad = images
    out = step(core, x, grad, natural, alpha, eps, norm)
    assert np.isfinite(out).all() and (out >= 0).all() and (out <= 1).all()
    distance = np.abs(out.astype(np.float64) - natural)
    size = distance.max() if norm == 0 else np.sqrt((distance**2).sum())
    assert size <= eps * (1 + 4 * EPS) + 2 * EPS * np.sqrt(len(x))


@holds(images, radii, st.sampled_from([0, 1]), st.sampled_from([0.0, np.nan, np.inf, -np.inf]))
def test_pgd_step_without_a_usable_gradient_moves_nothing(core, images, alpha, norm, bad):
    x, _, _ = images
    np.testing.assert_array_equal(step(core, x, np.full_like(x, bad), x, alpha, 0.5, norm), x)


@holds(images, radii, radii, st.floats(2.0**-100, 2.0**60, width=32))
def test_pgd_step_l2_ignores_the_gradients_scale(core, images, alpha, eps, scale):
    x, natural, grad = images
    grad = np.nan_to_num(np.clip(grad, -1e3, 1e3)).astype(np.float32)
    grad[np.abs(grad) < 1e-3] = 0
    scale = 2.0 ** np.round(np.log2(scale))  # powers of two scale without rounding
    a = step(core, x, grad, natural, alpha, eps, 1)
    b = step(core, x, (grad * scale).astype(np.float32), natural, alpha, eps, 1)
    np.testing.assert_array_equal(a, b)


@holds(images, radii, radii, st.integers(0, 39))
def test_pgd_step_keeps_nan_where_it_is(core, images, alpha, eps, where):
    x, natural, grad = images
    x = x.copy()
    x[where % len(x)] = np.nan
    out = step(core, x, np.nan_to_num(grad, posinf=1, neginf=-1), natural, alpha, eps, 0)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(x))


@holds(images, radii, radii, st.integers(1, 40))
def test_pgd_step_l1_stays_in_the_ball_and_the_box_and_moves_what_it_may(core, images, alpha, eps, k):
    x, natural, grad = images
    k = min(k, len(x))
    out = core.pgd_step_l1(x, grad, natural, alpha, eps, k, 0.0, 1.0)
    assert np.isfinite(out).all() and (out >= 0).all() and (out <= 1).all()
    assert np.abs(out.astype(np.float64) - natural).sum() <= eps * (1 + 4 * EPS) + 2 * EPS * len(x)
    free = core.pgd_step_l1(x, grad, x, alpha, 1e6, k, 0.0, 1.0)  # no ball: the step and the box alone
    stopped = ((x == 1) & (grad > 0)) | ((x == 0) & (grad < 0))
    size = np.where(stopped, 0, np.abs(grad)) if np.isfinite(grad).all() else np.zeros_like(grad)
    allowed = (size >= np.sort(size)[-k]) & (size > 0)
    length = np.float32(alpha) * (np.float32(1) / np.float32(max(1, allowed.sum())))
    ahead = np.where(allowed, np.where(grad > 0, length, -length), 0)
    np.testing.assert_array_equal(free, np.clip(x + ahead.astype(np.float32), 0, 1))


def momentum_step(core, x, grad, natural, previous, alpha, eps, momentum, norm):
    return core.apgd_step(x, grad, natural, previous, alpha, eps, momentum, norm, 0.0, 1.0)


@holds(images, radii, radii, radii, st.sampled_from([0, 1]), st.integers(0, 39))
def test_apgd_step_stays_in_the_ball_and_the_box(core, images, alpha, eps, momentum, norm, shift):
    x, natural, grad = images
    out = momentum_step(core, x, grad, natural, np.roll(x, shift), alpha, eps, momentum, norm)
    assert np.isfinite(out).all() and (out >= 0).all() and (out <= 1).all()
    distance = np.abs(out.astype(np.float64) - natural)
    size = distance.max() if norm == 0 else np.sqrt((distance**2).sum())
    assert size <= eps * (1 + 4 * EPS) + 2 * EPS * np.sqrt(len(x))


@holds(images, st.floats(-2, 2, width=32), st.sampled_from([0, 1, 2]))
def test_hyperplane_projection_reaches_the_plane_or_the_corner(core, images, share, norm):
    x, _, w = images
    usable = np.where(np.isfinite(w), w, 0).astype(np.float64)
    usable = usable / max(1.0, np.abs(usable).max())
    w = np.where(np.isfinite(w), usable, w).astype(np.float32)
    normal = np.where(np.isfinite(w), w, 0).astype(np.float64)
    gap = share * np.abs(normal).sum()
    move = core.hyperplane_projection(x, w, np.float32(normal @ x + gap), norm, 0.0, 1.0).astype(np.float64)
    z = x + move
    assert np.isfinite(move).all() and (z >= -EPS).all() and (z <= 1 + EPS).all()
    assert (move * normal * gap >= 0).all()
    most = (np.where(normal * gap > 0, 1 - x, x) * np.abs(normal)).sum()
    assert abs(abs(move @ normal) - min(abs(gap), most)) <= 64 * EPS * len(x)


@holds(shapes.flatmap(lambda s: rows(finite(300), s)))
def test_peel_decides_as_lse(core, logits):
    lse, peel = core.aggregate(0, logits), core.aggregate(1, logits)
    assert peel[lse.argmax()] == peel.max()
    assert (peel <= 0).all()


@holds(shapes.flatmap(lambda s: st.tuples(rows(finite(200), s), rows(finite(10), s[1]))))
def test_lse_gradient_shares_the_upstream_gradient_out(core, data):
    logits, grad = data
    out = core.aggregate_backward(0, grad, logits)
    assert np.isfinite(out).all()
    assert np.abs(out.astype(np.float64).sum(0) - grad).max() <= 64 * EPS * (1 + np.abs(grad).max())


# away from where squares vanish
feature = st.one_of(st.just(0.0), st.floats(2.0**-8, 16, width=32), st.floats(-16, -(2.0**-8), width=32))
features = st.integers(1, 100).flatmap(lambda n: st.tuples(rows(feature, n), rows(feature, n)))


@holds(features, st.integers(-8, 8), st.sampled_from(range(4)))
def test_representation_distance_of_parallel_vectors(core, data, power, kind):
    """Exactly 0, with gradient scale (v - along u) = 0; at any power of two but for l2."""
    u, _ = data
    v = u * np.float32(1 if kind == 3 else 2.0**power)
    distance, scale, along = core.representation_distance(kind, u, v)
    if not u.any():
        assert (distance, scale) == ((1, 0), (1, 0), (0.5, 0), (0, 0))[kind]
        return
    assert distance == 0 and np.isfinite(scale) and (v - np.float32(along) * u == 0).all()
    if kind == 0:
        assert core.representation_distance(kind, u, -v)[0] == 0


unit = st.floats(0, 1, width=32)


@holds(unit, st.integers(0, 2**24 - 1), unit)
def test_replayed_pixels_stay_in_the_ball_and_the_box(core, x, word, eps):
    x, eps, uniform = np.float32(x), np.float32(eps), np.float32(word * 2.0**-24)
    out = np.float32(core.replayed(x, uniform, eps, 0.0, 1.0))
    np.testing.assert_array_equal(out, np.clip(x + eps * (2 * uniform - np.float32(1)), np.float32(0), np.float32(1)))
    assert max(x - eps, np.float32(0)) <= out <= min(x + eps, np.float32(1))
    for bad in ((np.nan, uniform, eps), (x, uniform, np.nan)):
        assert np.isnan(core.replayed(*map(np.float32, bad), 0.0, 1.0))


grids = st.tuples(st.integers(1, 5), st.integers(1, 5))
moves = st.tuples(st.integers(-1, 0), st.integers(0, 1), st.integers(-1, 0), st.integers(0, 1))


def matrices(grid, seed):
    """Two of them, of whole numbers, whose sums are exact."""
    cells = grid[0] * grid[1]
    return np.random.default_rng(seed).integers(-1000, 1000, (2, cells, cells)).astype(np.float32)


@holds(grids, uint32, moves)
def test_windows_lead_back(core, grid, seed, moves):
    """<y, window(x)> = <window back(y), x>: what backward rests on; the fuses are their own way back."""
    x, y = matrices(grid, seed)
    back = tuple(-m for m in (moves[1], moves[0], moves[3], moves[2]))
    y = y.astype(np.float64)
    assert (y * core.window(x, *grid, moves)).sum() == (core.window(y, *grid, back) * x.astype(np.float64)).sum()
    for by_columns in (False, True):
        there, back_again = core.fuse(x, *grid, by_columns), core.fuse(y, *grid, by_columns)
        assert (y * there).sum() == (back_again * x.astype(np.float64)).sum()


@holds(grids, uint32)
def test_fuse_by_columns_is_fuse_by_rows_of_the_turned_grid(core, grid, seed):
    (height, width), x = grid, matrices(grid, seed)[0]
    order = np.arange(height * width).reshape(height, width).T.ravel()
    turned = core.fuse(x[order][:, order], width, height, False)
    np.testing.assert_array_equal(core.fuse(x, height, width, True)[order][:, order], turned)


@holds(st.integers(1, 40), st.integers(1, 255), st.data())
def test_every_part_owns_as_many_blocks(core, each, parts, data):
    blocks = each * parts
    owned = [core.owner_of(rank, blocks, 0, parts) for rank in range(blocks)]
    assert np.bincount(owned).tolist() == [each] * parts
    missing = data.draw(st.integers(0, blocks - 1))
    assert sum(core.owner_of(rank, blocks, missing, 0) for rank in range(blocks)) == missing
