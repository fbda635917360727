"""Properties of csrc/core, through the pybind11 module that CMake builds (`make test-cpp`)."""

import numpy as np
import pytest
import torch

from purify_fast import _library
from purify_fast.ops import philox, use_backend
from purify_fast.ops.philox import Stream


@pytest.mark.skipif(not _library.loaded(), reason="no compiled extension")
def test_normals_have_the_same_bits_for_every_instruction_set(core):
    """The module is compiled for the oldest CPU, the extension runs the clone for this one."""
    with use_backend("cpp"):
        ours = philox(torch.tensor([-5]), torch.arange(50), 400, stream=Stream.LATENT, distribution="normal")
    plain = [[core.draw_group(2, -5, group, 0, sample, 1) for group in range(100)] for sample in range(50)]
    np.testing.assert_array_equal(ours.numpy().view(np.uint32).ravel(), np.array(plain, np.uint32).ravel())
