"""Properties of csrc/core, through the pybind11 module that CMake builds (`make test-cpp`)."""

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
