"""Identifies this machine, and stores in a JSON file which of its kernels are correct and which calls use them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ... import _files

logger = logging.getLogger("purify_fast")

#: The contents of the files in this process, by path. They also have what is not written, such as verdicts on kernels
#: that raised an error.
_contents: dict[Path, dict[str, Any]] = {}


def folder() -> Path:
    """Return the folder of the files: ``PURIFY_FAST_CACHE``, or ``purify_fast`` in the user's cache folder."""
    if os.environ.get("PURIFY_FAST_CACHE"):
        return Path(os.environ["PURIFY_FAST_CACHE"]).expanduser()
    try:
        home = Path.home()
    except RuntimeError:
        # The user has no account and no HOME. Nobody can write below this path.
        home = Path(os.devnull)
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "purify_fast"


@functools.cache
def processor() -> str:
    """Return the name of the CPU, as reported by the system."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def triton_version() -> str:
    """Return the version of Triton, or an empty text without Triton."""
    try:
        # PyTorch installs Triton on some platforms only.
        import triton
    except ImportError:
        return ""
    return triton.__version__


@functools.cache
def machine(device: torch.device) -> dict[str, str]:
    """Return the device and the versions that determine what a kernel computes on it."""
    # PyTorch calls the GPUs of NVIDIA and of AMD ``cuda``.
    if gpu := device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, capability = torch.cuda.get_device_name(device), f"sm_{major}{minor}"
    else:
        name, capability = processor(), f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    facts = {"kind": device.type, "device": name, "capability": capability, "torch": torch.__version__}
    return facts | ({"triton": triton_version()} if gpu else {})


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


def file_of(device: torch.device) -> Path:
    """Return the path of this machine's file."""
    facts = machine(device)
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6).hexdigest()
    return folder() / f"kernels-{facts['kind']}-{digest}.json"


def _stored(device: torch.device) -> dict[str, Any]:
    """Return the content of the file on the disk; without ops if it is missing, damaged or of another machine."""
    path = file_of(device)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["ops"].values()
        sizes = [size for entry in entries if "tuned" in entry for size in entry["tuned"]["smallest"].values()]
        valid = all(entry["sources"] for entry in entries) and all(size is None or size >= 0 for size in sizes)
        if content["machine"] == machine(device) and valid:
            return dict(content)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s cannot be read (%s) and is not used", path, error)
    return {"machine": machine(device), "ops": {}}


def read(device: torch.device) -> dict[str, Any]:
    """Return what is known on this machine, with entries under ``ops``."""
    path = file_of(device)
    if path not in _contents:
        _contents[path] = _stored(device)
    return _contents[path]


def entry_of(op: str, sources: str, device: torch.device) -> dict[str, Any]:
    """Return the entry of an op; empty if there is none, or if it is of other sources."""
    entry: dict[str, Any] = read(device)["ops"].get(op, {})
    return entry if entry.get("sources") == sources else {}


def update(device: torch.device, ops: dict[str, Any], write: bool = True) -> None:
    """Add to the entries of ops; begin an entry anew if the op's ``sources`` changed. ``write`` stores the file."""
    # Another process may have written in the meantime. Of two processes at once, the last writer wins.
    for content in (read(device), stored := _stored(device)):
        for op, entry in ops.items():
            before = content["ops"].get(op, {})
            content["ops"][op] = {**(before if before.get("sources") == entry["sources"] else {}), **entry}
    stored["ops"] = dict(sorted(stored["ops"].items()))
    path = file_of(device)
    try:
        if write:
            _files.write_text(path, json.dumps(stored, indent=1) + "\n")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): set PURIFY_FAST_CACHE to a writable folder") from error
