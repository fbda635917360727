"""Files that are whole or absent: written aside, synced, moved into place."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

logger = logging.getLogger("purify_fast")

#: What a run does when a disk is full.
OnFull = Literal["stop", "wait"]
#: No space, no quota, and a file larger than the process may write.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Seconds between two attempts to write to a full disk.
PAUSE = 5.0


def with_room(write: Callable[[], None], path: Path, on_full: OnFull = "stop", remark: str = "") -> None:
    """Write a file; on a full disk say which and how large, and either end or wait until there is room.

    Args:
        write: writes the file, as often as it is called; what it leaves behind when it fails is removed by itself.
        path: the file, for the message.
        on_full: "stop" raises, "wait" tries again every few seconds until there is room.
        remark: what the message adds, such as which earlier file is kept.

    Raises:
        OSError: the file cannot be written; of a full disk only with "stop".
    """
    waited = False
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            text = f"{error.strerror}: {path} cannot be written, {_free(path.parent)}{remark}"
            if on_full == "stop":
                raise OSError(error.errno, f"{text}; make room and run the same command again to go on") from error
            if not waited:
                logger.warning("%s; waiting until there is room", text)
            waited = True
        time.sleep(PAUSE)


def _free(folder: Path) -> str:
    try:
        return f"its disk has {shutil.disk_usage(folder).free / 2**20:.1f} MiB free"
    except OSError:
        return "its disk does not say what is free"


@contextlib.contextmanager
def atomic(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """A temporary path beside ``path``, moved onto it when the block ends without an error.

    What was written is on the disk before it takes the name, and the name is on the disk when the block has ended.

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
            # a full disk, say: the system names no file when the writing itself fails
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
