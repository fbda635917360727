"""Properties of csrc/core, through the pybind11 module that CMake builds (`make test-cpp`)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from purify_fast import _library
from purify_fast.ops import philox, use_backend
from purify_fast.ops.philox import Stream


def holds(*strategies):
    """A property, tried on the same 200 examples every time."""
    return lambda test: settings(max_examples=200, deadline=None, derandomize=True)(given(*strategies)(test))


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


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
