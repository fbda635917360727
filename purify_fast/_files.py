"""Files that are whole or absent: written aside, synced, moved into place; what their tensors must be; a digest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, moved onto it when the block ends without an error."""
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
    """Write a UTF-8 text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_shapes(what: str, found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """Refuse tensors other than the wanted; ValueError starting with ``what``, naming four of them at most."""
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


class Digested(Protocol):
    """Stands for a tensor whose digest is kept with it, such as a file that is not read whole."""

    digest: str


def content_hash(dtype: torch.dtype, shape: Sequence[int]) -> hashlib.blake2b:
    """The hash of one tensor, still to be given its bytes."""
    return hashlib.blake2b(f"{dtype} {list(shape)}".encode(), digest_size=16)


def digest(*tensors: Tensor | Digested) -> str:
    """A hash of dtypes, shapes and contents; made of each tensor's own, so that a kept one can stand for its tensor."""
    whole = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            content = content_hash(tensor.dtype, tensor.shape)
            content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            whole.update(content.hexdigest().encode())
        else:
            whole.update(tensor.digest.encode())
    return whole.hexdigest()
