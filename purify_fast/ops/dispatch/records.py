"""Identifies this machine, and stores its results of verifying and racing kernels as files in a cache folder.

A machine has two JSON files: ``verified-*.json`` says whether each kernel is correct, and ``raced-*.json`` has the
results of the races. Each file has the device, the versions that determine what a kernel computes, and an entry for
each op.

The folder is ``PURIFY_FAST_CACHE``, or the platform's cache folder. Files are always replaced as a whole.
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
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any, Literal

import torch

from ... import _files

logger = logging.getLogger("purify_fast")

Kind = Literal["verified", "raced"]


def folder() -> Path:
    """Return the folder of the files: ``PURIFY_FAST_CACHE``, or the platform's cache folder."""
    if os.environ.get("PURIFY_FAST_CACHE"):
        return Path(os.environ["PURIFY_FAST_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData/Local") / "purify_fast/Cache"
    if sys.platform == "darwin":
        return _home() / "Library/Caches/purify_fast"
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "purify_fast"


def _home() -> Path:
    """The user's home folder, or a path below which nobody can write, if the user has no account and no HOME."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)


def processor() -> str:
    """Return the name of the CPU, as reported by the system."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def _triton_version() -> str:
    try:
        # PyTorch installs Triton on some platforms only.
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _driver() -> str:
    """Return the major CUDA version that the driver supports, or ``unknown`` if the driver's library is missing."""
    # PyTorch has no function for this version, but it has loaded the driver's library if there is a GPU.
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        failed = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "unknown"
    # For example, 13020 means CUDA 13.2.
    return "unknown" if failed else str(version.value // 1000)


@functools.cache
def machine(device: torch.device) -> dict[str, str]:
    """Return the device and the versions that determine what a kernel computes on it."""
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


def missing_compiler() -> str | None:
    """Return a text that says what Triton lacks for kernels on a GPU and how to install it, or None."""
    if not sys.platform.startswith("linux"):
        # On other platforms Triton has its own compiler.
        return None
    consequence = "Without it Triton cannot build kernels for a GPU, so PyTorch computes every op there"
    # Triton looks for the same compilers, in triton/runtime/build.py.
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return (
            f"there is no C compiler: neither gcc nor clang is on the PATH, and CC is not set. {consequence}. Install "
            "one (on Debian and Ubuntu: apt-get install gcc), or set CC to its path"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return (
            f"{header}, the C header of Python, is missing. {consequence}. Install it (on Debian and Ubuntu: apt-get "
            f"install python{sys.version_info[0]}.{sys.version_info[1]}-dev)"
        )
    return None


def files_digest(paths: tuple[Path, ...]) -> str:
    """Return a hash of the files' contents. A missing file counts as empty."""
    return hashlib.blake2b(b"".join(map(_content_digest, paths)), digest_size=8).hexdigest()


# The digest is cached, because a dozen ops share one extension with a size of megabytes.
@functools.cache
def _content_digest(path: Path) -> bytes:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError:
        return bytes(16)


def file_of(kind: Kind, device: torch.device) -> Path:
    """Return the path of one of this machine's files."""
    facts = machine(device)
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6).hexdigest()
    return folder() / f"{kind}-{facts['kind']}-{digest}.json"


def read(kind: Kind, device: torch.device) -> dict[str, Any]:
    """Return the content of a file, with entries under ``ops``; empty if missing, damaged or of another machine."""
    path = file_of(kind, device)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if content["machine"] == machine(device) and isinstance(content["ops"], dict) else {}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%s) and is not used", path, error)
        return {}


def update(kind: Kind, device: torch.device, ops: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write entries into a file, and keep the entries of other ops. Of two processes at once, the last writer wins."""
    path, entries = file_of(kind, device), {**read(kind, device).get("ops", {}), **ops}
    content = {"machine": machine(device), **facts, "ops": {op: entries[op] for op in sorted(entries)}}
    _files.write_text(path, json.dumps(content, indent=1) + "\n")
