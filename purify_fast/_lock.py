"""One run at a time in a folder: a lock that names its holder.

The lock is `filelock`'s: the operating system locks the file ``.purify_fast.lock`` and releases it when the process
ends, however it ends. ``.purify_fast.holder`` beside it says in words who has the lock. Both files are removed when the
run ends.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ._validation import check_folder

LOCK, HOLDER = ".purify_fast.lock", ".purify_fast.holder"
#: Seconds in which a lock is tried again: its holder may be removing the file.
PATIENCE = 0.2

#: The process and the thread that hold each lock of this process. A forked process holds none of its parent's.
_owners: dict[Path, tuple[int, int]] = {}


class FolderInUse(ValueError):
    """Another run writes into the folder."""


@contextlib.contextmanager
def folder_lock(folder: str | Path | None) -> Iterator[None]:
    """Within the block, no other process or thread has the lock of this folder; the same thread may take it again.

    Args:
        folder: created if it is missing; None locks nothing.

    Raises:
        FolderInUse: another run has the lock; the message names its machine, process, start and command.
        ValueError: there is a file in the folder's place.
        OSError: the folder cannot be written to, or its file system refuses locks.
    """
    if folder is None:
        yield
        return
    # importing it takes 0.1 seconds: the command line's --help does without it
    from filelock import FileLock, Timeout

    check_folder("the run's folder", folder)
    folder = Path(folder)
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path, this = folder.resolve() / LOCK, (os.getpid(), threading.get_ident())
    owner = _owners.get(path)
    if owner == this:
        yield
        return
    if owner is not None and owner[0] == this[0]:
        raise FolderInUse(f"{folder} is written by another thread of this process: wait for it, or give another")
    lock = FileLock(path, timeout=PATIENCE, poll_interval=PATIENCE / 10)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUse(f"{folder} is written by another run{_holder(folder)}") from None
    _owners[path] = this
    try:
        # the operating system has locked the folder: on a full disk the lock holds without its holder's name
        with contextlib.suppress(OSError):
            (folder / HOLDER).write_text(_this_process())
        yield
    finally:
        del _owners[path]
        with contextlib.suppress(OSError):
            (folder / HOLDER).unlink()
        # before the lock is released, so that nobody locks a file that is about to go
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
        # the folders of a command that was refused before it wrote anything
        with contextlib.suppress(OSError):
            for place in created:
                place.rmdir()


def _this_process() -> str:
    since = datetime.datetime.now().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since} ({' '.join(sys.argv)[:300]})"


def _holder(folder: Path) -> str:
    """Who has the lock, and what to do, as the end of a sentence."""
    try:
        who = f": {(folder / HOLDER).read_text()}"
    except (OSError, UnicodeDecodeError):
        who = ""
    return f"{who}; wait for it, end it, or give another folder"
