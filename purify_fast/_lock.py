"""One run at a time in a folder: a lock that names its holder, and that ends with its process however that ends.

The lock is a file, ``.purify_fast.lock``, which is removed when the run ends. Where the file system has locks of its
own, the file is locked: the system releases it when the process dies. Where it has none, and where the file was left by
another machine, the file's content decides. Its holder counts up a number in it every few seconds: a number that stays
as it is belongs to a process that is gone. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._validation import check_folder

NAME = ".purify_fast.lock"
#: Seconds from one sign of life to the next, and how long another machine's process is watched for one.
BEAT, WATCH = 3.0, 10.0


class FolderInUse(ValueError):
    """Another run writes into the folder."""


@dataclass
class _Held:
    """A lock of this process.

    Attributes:
        handle: of the locked file.
        process: which holds it; a process that is forked from it does not.
        thread: which took it, and may take it again.
        times: how often that thread has taken it.
        made: the folders that were made for it, which go with it if they stay empty.
        ended: set to end the signs of life.
    """

    handle: int
    process: int
    thread: int
    times: int = 1
    made: list[Path] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


_held: dict[Path, _Held] = {}
#: The locks that threads are about to take, with the process that does: watching another machine's takes seconds.
_taking: dict[Path, int] = {}
#: Held for moments only, so that no lock of another folder waits.
_guard = threading.Lock()


@contextlib.contextmanager
def folder_lock(folder: str | Path | None) -> Iterator[None]:
    """Within the block, no other process or thread has the lock of this folder; the same thread may take it again.

    Args:
        folder: made if it is missing; None locks nothing.

    Raises:
        FolderInUse: another run has the lock; the message names its machine, process, start and command.
        ValueError: there is a file in the folder's place.
        OSError: the folder cannot be written to.
    """
    if folder is None:
        yield
        return
    check_folder("the run's folder", folder)
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / NAME
    with _guard:
        mine = _held.get(path)
        if mine is not None and mine.process != os.getpid():
            # a process that was forked: the lock is its parent's
            mine = None
        beside = mine.thread != threading.get_ident() if mine is not None else _taking.get(path) == os.getpid()
        if beside:
            raise FolderInUse(f"{folder} is written by another thread of this process: wait for it, or give another")
        if mine is None:
            _taking[path] = os.getpid()
        else:
            mine.times += 1
    if mine is None:
        mine = _taken(path, folder, made)
    try:
        yield
    finally:
        with _guard:
            mine.times -= 1
            if mine.times == 0:
                del _held[path]
                _release(path, mine)


def _taken(path: Path, folder: Path, made: list[Path]) -> _Held:
    """The lock, taken by this thread; ``made`` are the folders that were made for it."""
    try:
        held = _take(path, folder)
        held.made = made
        with _guard:
            _held[path] = held
        return held
    finally:
        with _guard:
            del _taking[path]


def _take(path: Path, folder: Path) -> _Held:
    gone: set[str] = set()
    while True:
        handle, locked = _opened(path, folder)
        holder = _content(handle)
        if holder is None or holder["token"] in gone:
            break
        # closed while its holder is watched: what reads the file anew would give up the lock
        os.close(handle)
        if (found := _lives(path, holder, locked)) is not None:
            raise FolderInUse(_words(folder, found))
        gone.add(holder["token"])
    own = _own()
    try:
        _write(handle, own)
    except OSError as error:
        # on a full disk, say: where the system locked the file, what it says is for messages alone
        if not locked:
            os.close(handle)
            raise OSError(error.errno, error.strerror, str(path)) from error
    if not locked:
        # Two processes may have found the file free. The one that wrote last has it.
        time.sleep(0.5)
        if (found := _content(handle)) is None or found["token"] != own["token"]:
            os.close(handle)
            raise FolderInUse(_words(folder, found))
    held = _Held(handle, os.getpid(), threading.get_ident())
    threading.Thread(target=_live, args=(held, own), daemon=True, name="folder-lock").start()
    return held


def _opened(path: Path, folder: Path) -> tuple[int, bool]:
    """The file, opened, and whether the system locked it; FolderInUse if it is another's."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        locked = _lock(handle)
        if locked is False:
            holder = _content(handle)
            os.close(handle)
            raise FolderInUse(_words(folder, holder))
        with contextlib.suppress(OSError):
            # its holder may have removed it after it was opened here
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                return handle, locked is True
        os.close(handle)


def _release(path: Path, held: _Held) -> None:
    held.ended.set()
    if held.process == os.getpid():
        # before the lock is given up, so that nobody finds a file that is about to go
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        os.close(held.handle)
    with contextlib.suppress(OSError):
        for place in held.made:
            # of a command that was refused before it wrote anything
            place.rmdir()


def _live(held: _Held, own: dict[str, Any]) -> None:
    """Count up the number in the file until the lock is given up."""
    while not held.ended.wait(BEAT):
        own["beat"] += 1
        with contextlib.suppress(OSError):
            _write(held.handle, own)


def _lock(handle: int) -> bool | None:
    """Whether the system gave the lock; None where it has no locks.

    A lock of this kind is a process's own: one that is forked from it does not keep it alive.
    """
    if sys.platform == "win32":
        return None
    # Unix alone has it
    import fcntl

    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _own() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _text(Path("/proc/sys/kernel/random/boot_id")),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.datetime.now().isoformat(" ", "seconds"),
        "command": " ".join(sys.argv)[:300],
        "token": os.urandom(8).hex(),
        "beat": 0,
    }


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _started(process: int) -> str:
    """When a process of this machine started, in the system's own units; empty if there is none, or it is not told."""
    # behind the name of its program, which may hold spaces and brackets
    fields = _text(Path(f"/proc/{process}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _write(handle: int, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode().ljust(1024)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, data)
    os.fsync(handle)


def _content(handle: int) -> dict[str, Any] | None:
    """What a lock's file says; None if it says nothing whole."""
    os.lseek(handle, 0, os.SEEK_SET)
    return _parsed(os.read(handle, 4096))


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except ValueError:
        return None
    wanted = ("host", "boot", "process", "started", "since", "command", "token", "beat")
    return found if isinstance(found, dict) and all(name in found for name in wanted) else None


def _lives(path: Path, holder: dict[str, Any], locked: bool) -> dict[str, Any] | None:
    """What a file says of its holder that is at work, though the system does not say so; None if that is gone.

    Args:
        path: the file.
        holder: what it told before.
        locked: whether the system locked it for this process.
    """
    boot = _text(Path("/proc/sys/kernel/random/boot_id"))
    if boot and holder["boot"] == boot:
        # of this machine: where the system has locks, it has released this one
        lives = not locked and bool(holder["started"]) and _started(holder["process"]) == holder["started"]
        return holder if lives else None
    if locked and not boot and holder["host"] == socket.gethostname():
        return None
    until = time.monotonic() + WATCH
    while time.monotonic() < until:
        time.sleep(BEAT / 4)
        try:
            found = _parsed(path.read_bytes())
        except OSError:
            return None
        if found is not None and (found["token"], found["beat"]) != (holder["token"], holder["beat"]):
            # it may be another one that took the lock meanwhile: that is the one to name
            return found
    return None


def _words(folder: Path, holder: dict[str, Any] | None) -> str:
    if holder is None:
        return f"{folder} is written by another run: wait for it, end it, or give another folder"
    return (
        f"{folder} is written by another run: process {holder['process']} on {holder['host']} since {holder['since']} "
        f"({holder['command']}); wait for it, end it, or give another folder"
    )
