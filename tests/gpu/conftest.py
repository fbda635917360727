"""The tests of a device: of the GPU's kernels, or rehearsed on a CPU's with PURIFY_FAST_TEST_DEVICE=cpu.

With PURIFY_FAST_TEST_SECONDS, tests that would start later than that are skipped, and say so. PURIFY_FAST_TEST_STRIDE=N
runs every N-th case of each test. With PURIFY_FAST_TEST_OUTCOMES, what becomes of each test is appended to that file as
a line of JSON.
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

# the tests import the module on_device, and trainings of tests/training
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "training")]
# poisoned allocations need deterministic algorithms, and those of cuBLAS need this before the first product
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# PyTorch rounds the operands of convolutions to 10 bits by default, which is a hundred times what these tests allow
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False
LIMIT = float(os.environ.get("PURIFY_FAST_TEST_SECONDS", "inf"))
BEGAN = time.monotonic()
OUTCOMES = os.environ.get("PURIFY_FAST_TEST_OUTCOMES")
STRIDE = int(os.environ.get("PURIFY_FAST_TEST_STRIDE", "1"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - BEGAN > LIMIT:
        pytest.skip(f"left out: the time limit of {LIMIT:g} s")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases: Counter[str] = Counter()
    left_out = []
    for item in items:
        name = item.nodeid.partition("[")[0]
        if cases[name] % STRIDE:
            left_out.append(item)
        cases[name] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


class Outcomes:
    """Appends what becomes of every test to the file."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            line = {"test": report.nodeid, "outcome": report.outcome, "why": report.longreprtext[-1000:]}
            with open(OUTCOMES, "a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")


def pytest_configure(config: pytest.Config) -> None:
    # with xdist the process that collects all reports writes, and no worker does; the environment does not tell them
    # apart, since a test of this run may itself be run by a worker
    if OUTCOMES and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes())
