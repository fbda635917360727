"""Files that are whole or absent, folders with one run at a time, and the record of an extension's sources.

A file is written aside, synced, and moved into place.

The lock of a folder is `filelock`'s: the operating system locks the file ``.purify_fast.lock`` and releases it when the
process ends, however it ends. ``.purify_fast.holder`` beside it says in words who has the lock. Both files are removed
when the run ends.

setup.py reads this module by itself, so that it imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

logger = logging.getLogger("purify_fast")

#: The reaction of a run to a full disk: "stop" raises an error, "wait" tries again until there is room.
OnFull = Literal["stop", "wait"]
#: The errors of a full disk: no space is left, a quota is used up, or the file is larger than the process may write.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Seconds between two attempts to write to a full disk.
PAUSE = 5.0
LOCK, HOLDER = ".purify_fast.lock", ".purify_fast.holder"
#: Seconds for which a lock is tried again, because the run that has it may be about to remove the file.
PATIENCE = 0.2

#: For each lock that was taken in this process: the ids of the process and of the thread that took it. After a fork,
#: the process id shows that the child does not have its parent's locks.
_owners: dict[Path, tuple[int, int]] = {}

#: The file beside the extension in which its build notes, among other facts, the hash of the C++ sources.
RECORD = "_build.json"
#: The folders of ``csrc`` whose files are compiled into the extension.
PARTS = ("core", "cpu")
#: Files by which this package's ``csrc`` is recognized. Another package may have put a folder of this name into
#: ``site-packages``.
MARKS = ("core/philox.h", "cpu/philox.cpp")


def with_room(write: Callable[[], None], path: Path, on_full: OnFull = "stop", remark: str = "") -> None:
    """Write a file; on a full disk say which and how large, and either end or wait until there is room.

    Args:
        write: writes the file. It may be called several times, and removes by itself what a failure leaves behind.
        path: the file, for the message.
        on_full: "stop" raises, "wait" tries again every few seconds until there is room.
        remark: text that the message adds, such as which earlier file is kept.

    Raises:
        OSError: the file cannot be written; a full disk raises it only with "stop".
    """
    waited = False
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            # If the disk was disconnected, its free space cannot be read, and the message leaves it out.
            free = ""
            with contextlib.suppress(OSError):
                free = f", its disk has {shutil.disk_usage(path.parent).free / 2**20:.1f} MiB free"
            text = f"{error.strerror}: {path} cannot be written{free}{remark}"
            if on_full == "stop":
                raise OSError(error.errno, f"{text}; make room, then run the same command again to continue") from error
            if not waited:
                logger.warning("%s; waiting until there is room", text)
            waited = True
        time.sleep(PAUSE)


@contextlib.contextmanager
def atomic(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """A temporary path beside ``path``, moved onto it when the block ends without an error.

    The content is on the disk before it takes the name, and the name is on the disk when the block has ended.

    Args:
        path: the file to write; its folder is created if it is missing.
        previous: the name that the file before it gets; None drops it. At every moment one of the two names is a whole
            file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        if previous is not None and path.is_file():
            os.replace(path, previous)
        os.replace(name, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            # If the writing itself fails, as on a full disk, the system's error has no file name. Add the name.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        Path(name).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last: only then is a file that was renamed there after a power failure."""
    # Windows cannot open a folder, and some network file systems cannot sync one.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, which is whole or absent.

    Args:
        path: the file.
        text: all of its content.
    """
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode())


# -- folders ----------------------------------------------------------------------------------------------------------


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
    # Imported here because filelock takes 0.1 seconds, for which the command line's --help should not wait.
    from filelock import FileLock, Timeout

    from ._validation import check_folder

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
        raise FolderInUse(
            f"{folder} is in use by another thread of this process: wait for that thread, or give another folder"
        )
    lock = FileLock(path, timeout=PATIENCE, poll_interval=PATIENCE / 10)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUse(f"{folder} is in use by another run{_holder(folder)}") from None
    _owners[path] = this
    try:
        # On a full disk this file cannot be written. The operating system has locked the folder all the same; messages
        # then lack the name of the run.
        with contextlib.suppress(OSError):
            (folder / HOLDER).write_text(_this_process())
        yield
    finally:
        del _owners[path]
        with contextlib.suppress(OSError):
            (folder / HOLDER).unlink()
        # Remove the lock file before the lock is released. Afterwards another run could already have locked it.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
        # Remove the folders that this block created if they are empty, as after a command that was refused.
        with contextlib.suppress(OSError):
            for place in created:
                place.rmdir()


def lock_file(handle: int, *, shared: bool) -> bool:
    """Lock an open file without waiting, until it is closed or its process ends.

    Args:
        handle: descriptor of the file. Duplicates of the descriptor share the lock, which lasts until the last of them
            is closed.
        shared: whether others may have such a lock at the same time. A lock that is not shared excludes all others.

    Returns:
        True if the file is locked. On Windows always True: that system lets nobody remove a file that is open.
    """
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            # Another process has the lock, or the file system does not support locks.
            return False
    return True


def _this_process() -> str:
    since = datetime.datetime.now().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since} ({' '.join(sys.argv)[:300]})"


def _holder(folder: Path) -> str:
    """The end of a sentence: who has the lock, and what to do."""
    try:
        who = f": {(folder / HOLDER).read_text()}"
    except (OSError, UnicodeDecodeError):
        who = ""
    return f"{who}; wait for that run, end it, or give another folder"


# -- the sources of the extension --------------------------------------------------------------------------------------


def csrc_hash(folder: Path) -> str:
    """A hash of names and contents of the sources.

    Args:
        folder: ``csrc``.
    """
    content = hashlib.blake2b(digest_size=16)
    for path in sorted(path for part in PARTS for path in (folder / part).glob("*") if path.is_file()):
        for text in (path.relative_to(folder).as_posix().encode(), path.read_bytes()):
            content.update(len(text).to_bytes(8, "little") + text)
    return content.hexdigest()


def is_stale(extension: Path, folder: Path) -> bool:
    """Tell whether an extension was built from other sources than those of a checkout.

    Its ops may then take other arguments than this package's Python gives them.

    Args:
        extension: the shared object, whose record lies beside it.
        folder: ``csrc`` of the checkout; without it, as in an installed wheel, nothing is stale.
    """
    if not all((folder / name).is_file() for name in MARKS):
        return False
    try:
        record = json.loads(extension.with_name(RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    return not isinstance(record, dict) or record.get("sources") != csrc_hash(folder)
