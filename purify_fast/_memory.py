"""The host's memory: how much is available, and whether an error says that memory ran out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

#: Bytes that are assumed to be available if the system does not tell.
USUAL = 8 * 2**30


def available_memory() -> int:
    """The bytes that this process can still allocate on the host."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return USUAL
    return max(0, min([free, *_left_to_groups(Path("/"))]))


def _left_to_groups(root: Path) -> Iterator[int]:
    """The unused bytes of each control group (of version 2) that contains this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    # Lines of version 1 name controllers between the colons.
    for inside in (Path(line.removeprefix("0::").lstrip("/")) for line in lines if line.startswith("0::")):
        # The limits of the outer groups hold too. Inside a container their folders may be missing.
        for group in (root / "sys/fs/cgroup" / part for part in (inside, *inside.parents)):
            # The file contains "max" if there is no limit.
            with contextlib.suppress(OSError, ValueError):
                most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
                yield most - used + _reclaimable(group)


def _reclaimable(group: Path) -> int:
    """The bytes of cached files in a control group, which the system frees when memory is needed."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(lines["inactive_file"])
    return 0


def peak_resident_memory(process: int | str = "self") -> int:
    """The peak of a process's memory so far, in bytes; 0 if the system does not tell, or if the process has ended."""
    # The peak that getrusage or wait4 gives includes that of the process which started this process.
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines() if line)
    return 1024 * int(lines["VmHWM"].split()[0]) if "VmHWM" in lines else 0


def ran_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory ran out."""
    # oneDNN names no reason if it cannot allocate the memory of a primitive.
    texts = "can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "could not create a primitive"
    by_text = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or by_text
