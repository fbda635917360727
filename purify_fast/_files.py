"""Files that are whole or absent: written aside, synced, moved into place; and what their tensors must be."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, moved onto it when the block ends without an error.

    Args:
        path: the file to write; its folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            # a full disk, say: the system names no file when the writing itself fails
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, which is whole or absent.

    Args:
        path: the file.
        text: all of its content.
    """
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_shapes(what: str, found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """Refuse tensors other than the wanted ones.

    Args:
        what: how the error begins.
        found: the shape of each tensor, by its name.
        wanted: likewise.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; four of them at most are named.
    """
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is unknown" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {list(found[name])}, must be {list(wanted[name])}"
        for name in sorted(wanted.keys() & found.keys())
        if tuple(found[name]) != tuple(wanted[name])
    ]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:4])}{more}")
