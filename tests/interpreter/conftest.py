"""The Triton kernels on CPU tensors, in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreter`.

The interpreter rounds float32 to bfloat16 by truncation; the budgets here allow it (two eps).
"""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def interpreter():
    import triton

    from purify_fast.kernels import philox

    if isinstance(philox._philox, triton.JITFunction):
        state = "set too late" if os.environ.get("TRITON_INTERPRET") == "1" else "not set"
        pytest.fail(
            f"TRITON_INTERPRET=1 was {state}: it must be there before triton is imported, so these tests need a "
            "process of their own: TRITON_INTERPRET=1 python -m pytest tests/interpreter",
            pytrace=False,
        )


@pytest.fixture(autouse=True)
def quiet():
    """NumPy warns of what the masked lanes compute."""
    import numpy

    with numpy.errstate(all="ignore"):
        yield
