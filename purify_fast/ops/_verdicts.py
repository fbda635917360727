"""What is known of the kernels on this machine: which were verified, and with which error; kept on disk.

A machine has one file, which names the device and the versions that decide what a kernel computes. In it each op has
one verdict, with a hash of the op's sources: a verdict on other sources counts for nothing and is replaced.

The folder is ``PURIFY_FAST_CACHE``, or the platform's folder for caches. Files are replaced as a whole, and processes
that verify at the same time wait for each other: the first verifies, the others read. Where the folder cannot be
written, the verdicts last as long as the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import _files

logger = logging.getLogger("purify_fast")


#: What stands for an infinite error, which JSON does not have.
LARGEST = 1e300


#: How the finding of a verification begins that had too little memory: it is no finding about the kernel.
NO_MEMORY = "not verified for want of memory"


@dataclass(frozen=True)
class Verdict:
    """What one verification found.

    Attributes:
        backend: whose kernel was verified.
        sources: `sources_digest` of what it was built from.
        passed: whether every result was within its budget.
        error: the largest absolute error against float64, of the case that came closest to its budget.
        budget: the error that was allowed there.
        case: that case: example and dtype; or the error that the kernel raised.
        seconds: what the verification took.
        date: when, as ISO 8601.
    """

    backend: str
    sources: str
    passed: bool
    error: float
    budget: float
    case: str
    seconds: float
    date: str

    @property
    def postponed(self) -> bool:
        """Whether there was no memory to verify the kernel with, so that nothing is known of it."""
        return self.case.startswith(NO_MEMORY)

    @property
    def share(self) -> float:
        """The error as a multiple of its budget, which is 0 where bits must agree."""
        return self.error / self.budget if self.budget else self.error

    def words(self) -> str:
        """The finding, as `purify-fast info` and a warning tell it."""
        if self.passed:
            return f"verified {self.date[:10]}, error {self.error:.1g} of {self.budget:.1g} allowed"
        if self.error < LARGEST:
            return f"an error of {self.error:.2g} where {self.budget:.2g} is allowed ({self.case})"
        return self.case


def folder() -> Path:
    """Where verdicts are kept: ``PURIFY_FAST_CACHE``, or the platform's folder for caches."""
    if os.environ.get("PURIFY_FAST_CACHE"):
        return Path(os.environ["PURIFY_FAST_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "purify_fast/Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/purify_fast"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "purify_fast"


def processor() -> str:
    """The CPU's name, as the system gives it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def _triton_version() -> str:
    try:
        # optional: it comes with PyTorch for NVIDIA GPUs only
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _driver() -> str:
    """The major CUDA version that the driver supports; ``unknown`` where the driver's library is not found."""
    # PyTorch has no name for it; its library is loaded already where there is a GPU
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        failed = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "unknown"
    return "unknown" if failed else str(version.value // 1000)  # 13020 is CUDA 13.2


@functools.cache
def machine(device: torch.device) -> dict[str, str]:
    """The device and the versions that decide what a kernel computes on it."""
    if device.type != "cuda":
        capability = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return {"kind": device.type, "device": processor(), "capability": capability, "torch": torch.__version__}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "kind": "cuda",
        "device": torch.cuda.get_device_name(device),
        "capability": f"sm_{major}{minor}",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "driver": _driver(),
    }


def sources_digest(paths: tuple[Path, ...]) -> str:
    """A hash of the files' contents; those that are absent count as empty."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        digest.update(_content_digest(path))
    return digest.hexdigest()


@functools.cache  # an extension of megabytes belongs to a dozen ops
def _content_digest(path: Path) -> bytes:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError:
        return bytes(16)


def file_of(device: torch.device) -> Path:
    """The file of this machine's verdicts."""
    facts = machine(device)
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6).hexdigest()
    return folder() / f"verified-{facts['kind']}-{digest}.json"


def read(path: Path, facts: dict[str, str]) -> dict[str, Verdict]:
    """The verdicts of a file by op; none where it is absent, damaged, or of another machine."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["machine"] != facts:
            return {}
        return {op: Verdict(**verdict) for op, verdict in kept["ops"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): the kernels are verified again", path, error)
        return {}


def write(path: Path, facts: dict[str, str], verdicts: dict[str, Verdict]) -> None:
    """Replace the file as a whole; OSError where that is not possible."""
    kept = {"machine": facts, "ops": {op: asdict(verdicts[op]) for op in sorted(verdicts)}}
    _files.write_text(path, json.dumps(kept, indent=1) + "\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """One process at a time is in the block for this path; gives whether the folder can be written.

    The lock ends with its process, however that ends. Windows has no such locks: there, two processes may both verify.
    """
    lock = path.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        yield False
        return
    try:
        if sys.platform != "win32":
            # Unix alone has it
            import fcntl

            # Some shared file systems have no locks: there, as on Windows, the last writer wins.
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(handle)
