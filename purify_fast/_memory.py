"""The host's memory: what may still be taken, and whether an error says that there was too little."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

#: Bytes per unit, by the lower-case prefix of the unit.
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
#: The bytes that are assumed to be available if the system does not say how many are.
USUAL = 8 * 2**30


def bytes_of(amount: int | str) -> int:
    """An amount of memory in bytes: a number of them, or a text such as "20GB", "512 MB" or "8GiB".

    Args:
        amount: the amount.

    Raises:
        ValueError: any other text, or less than one byte.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", str(amount).lower())
    if found is None or found[2] not in UNITS or (count := int(float(found[1]) * UNITS[found[2]])) < 1:
        raise ValueError(f"memory must be a number of bytes, or a text such as 20GB or 8GiB, got {amount!r}")
    return count


def available_memory() -> int:
    """Bytes that this process can still take on the host.

    It is the least of three: the memory that Linux calls available, the rest of the control groups of the process, and
    the rest of its own limits on address space and data. Other systems count as 8 GiB.
    """
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return USUAL
    return max(0, min([free, *_left_to_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), *_left_by_limits()]))


def _left_to_groups(groups: Path, mounted: Path) -> Iterator[int]:
    """The rest of each control group that this process is in, of both versions.

    Args:
        groups: the file that names them.
        mounted: the folder of the groups.
    """
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = mounted / "memory" if controllers else mounted
            names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
            inside = Path(place.lstrip("/"))
            # Inside a container the folders of the outer groups may be missing.
            for group in (top / part for part in (inside, *inside.parents)):
                # The file contains "max" if there is no limit.
                with contextlib.suppress(OSError, ValueError):
                    most, used = (int((group / f"memory.{name}").read_text()) for name in names)
                    yield most - used + _reclaimable(group)


def _reclaimable(group: Path) -> int:
    """The bytes of files that a control group holds and would give back at once."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(lines.get("total_inactive_file", lines["inactive_file"]))
    return 0


def _left_by_limits() -> Iterator[int]:
    """The rest of the process's own limits on its address space and its data."""
    if sys.platform != "linux":
        return
    import resource

    page = resource.getpagesize()
    sizes = [int(word) * page for word in Path("/proc/self/statm").read_text().split()]
    for limit, taken in ((resource.RLIMIT_AS, sizes[0]), (resource.RLIMIT_DATA, sizes[5])):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            yield soft - taken


def resident_memory() -> int:
    """Bytes of the host's memory that this process takes; 0 if the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(dict(line.split(":", 1) for line in status.splitlines() if line)["VmRSS"].split()[0])


def peak_resident_memory() -> int:
    """The most bytes of the host's memory that this process has taken so far; 0 if the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    # Linux gives this number in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out.

    Args:
        error: any error. PyTorch has a class for a GPU's memory. For a CPU's memory only the text of a RuntimeError
            says so.
    """
    texts = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
    by_text = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or by_text
