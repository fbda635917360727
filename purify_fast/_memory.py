"""The host's memory: the peak of this process, and whether an error says that memory ran out."""

from __future__ import annotations

from pathlib import Path


def peak_resident_memory() -> int:
    """The peak of this process's memory so far, in bytes; 0 if the system does not tell."""
    # The peak that getrusage or wait4 gives includes that of the process which started this process.
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines() if line)
    return 1024 * int(lines["VmHWM"].split()[0]) if "VmHWM" in lines else 0


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out."""
    # oneDNN names no reason if it cannot allocate the memory of a primitive.
    texts = "can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "could not create a primitive"
    by_text = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or by_text
