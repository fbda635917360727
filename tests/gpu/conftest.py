"""The tests of a device: of the GPU's kernels, or rehearsed on a CPU's with PURIFY_FAST_TEST_DEVICE=cpu.

With PURIFY_FAST_TEST_SECONDS, tests that would start later than that are skipped, and say so.
"""

from __future__ import annotations

import os
import time

import pytest
import torch

# poisoned allocations need deterministic algorithms, and those of cuBLAS need this before the first product
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# PyTorch rounds the operands of convolutions to 10 bits by default, which is a hundred times what these tests allow
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False
LIMIT = float(os.environ.get("PURIFY_FAST_TEST_SECONDS", "inf"))
BEGAN = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - BEGAN > LIMIT:
        pytest.skip(f"left out: the time limit of {LIMIT:g} s")
