"""The tests of a device: of the GPU's kernels, or rehearsed on a CPU's with PURIFY_FAST_TEST_DEVICE=cpu.

With PURIFY_FAST_TEST_SECONDS, tests that would start later than that are skipped, and say so. With
PURIFY_FAST_TEST_PASSED, tests that pass are appended to that file one by one, so that a run that is killed goes on
where it was: those that the file beside it names, with the ending ``.known``, are not run.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

# poisoned allocations need deterministic algorithms, and those of cuBLAS need this before the first product
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# PyTorch rounds the operands of convolutions to 10 bits by default, which is a hundred times what these tests allow
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False
LIMIT = float(os.environ.get("PURIFY_FAST_TEST_SECONDS", "inf"))
BEGAN = time.monotonic()
PASSED = os.environ.get("PURIFY_FAST_TEST_PASSED")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - BEGAN > LIMIT:
        pytest.skip(f"left out: the time limit of {LIMIT:g} s")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = Path(f"{PASSED}.known")
    if PASSED and known.exists():
        passed = set(known.read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


class Passed:
    """Appends every test that passes to the file."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            with open(PASSED, "a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    # with xdist the process that collects all reports writes, and no worker does; the environment does not tell them
    # apart, since a test of this run may itself be run by a worker
    if PASSED and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Passed())
