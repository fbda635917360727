"""Makes a command a good neighbor on a shared machine: passive waiting, and no more threads than cores.

This module does not import PyTorch, because OpenMP reads its settings when PyTorch is loaded.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from .._memory import control_groups

#: The variables by which a user decides how OpenMP's threads wait.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has decided. Call this before PyTorch is loaded."""
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def allowed_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use, by its affinity and by the CPU quota of its container; at least 1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for group, version in control_groups("cpu", root):
        # Without a limit, the quota is -1 in version 1 and "max" in version 2.
        with contextlib.suppress(OSError, ValueError):
            if version == 1:
                quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            else:
                quota, period = map(int, (group / "cpu.max").read_text().split())
            cores = min(cores, max(1, quota // period)) if quota > 0 else cores
    return cores
