"""Makes a command a good neighbor on a shared machine: passive waiting, and no more threads than cores.

This module does not import PyTorch, because OpenMP reads its settings when PyTorch is loaded.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

#: The variables by which a user decides how OpenMP's threads wait.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has decided. Call this before PyTorch is loaded."""
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def allowed_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use, by its affinity and by the CPU quota of its container; at least 1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            # cgroup v2 has a single line, which names no controllers.
            base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            if controllers and "cpu" not in controllers.split(","):
                continue
            # The quota of each parent holds too. In a container, the path may be that of the host, and not exist here.
            inside = Path(path.lstrip("/"))
            for group in (inside, *inside.parents):
                cores = min([cores, *(max(1, int(quota)) for quota in _quotas(base / group))])
    return cores


def _quotas(group: Path) -> list[float]:
    """Return the quota of a control group in cores, in a list that is empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        # Without a limit, the quota is "max" in v2 and -1 in v1.
        return [int(quota) / int(period)] if int(quota) > 0 else []
    return []
