"""Write files atomically, and lock folders."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ._places import check_folder

LOCK = ".purify_fast.lock"
#: Seconds for which the program tries to get a lock, because the run that has the lock may end within this time.
PATIENCE = 0.2


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and rename it to ``path`` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        # Sync the names of the files, so that the file keeps its new name after a power failure. Windows cannot open a
        # folder, and some network file systems cannot sync a folder.
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            # The system's error has no file name if the write failed, for example on a full disk. Add the name.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. A part of a name that is not UTF-8 is written with backslashes."""
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))


# -- folders ----------------------------------------------------------------------------------------------------------


class FolderInUse(ValueError):
    """Raised if another run writes into the folder."""


@contextlib.contextmanager
def folder_lock(folder: str | Path | None) -> Iterator[None]:
    """Lock a folder against all other processes and threads within the block. The same thread may lock it again."""
    if folder is None:
        yield
        return
    # The import of filelock takes 0.1 seconds, and ``--help`` on the command line should not wait for it.
    from filelock import FileLock, Timeout

    check_folder("the run's folder", folder)
    folder = Path(folder)
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    # Each thread has its own lock, which it may take again.
    lock = FileLock(path, timeout=PATIENCE, poll_interval=PATIENCE / 10, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUse(f"{folder} is in use by another run; wait for it, end it, or give another folder") from None
    try:
        yield
    finally:
        # Remove the lock file before the lock is released. After the release, another run may have locked the file.
        if lock.lock_counter == 1:
            path.unlink(missing_ok=True)
        lock.release()
        # Remove the empty folders among those that this block created.
        with contextlib.suppress(OSError):
            for place in created:
                place.rmdir()
