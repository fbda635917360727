"""Find the weights of the zoo's models on this machine, or download them from the release of this version."""

from __future__ import annotations

import hashlib
import sys
import urllib.request
from http.client import HTTPException
from importlib.metadata import metadata
from pathlib import Path

from .._files import atomic
from .._version import __version__
from ..ops.dispatch.records import folder as cache_folder
from ..training.checkpoint import MODEL

#: Seconds without an answer after which a download fails.
TIMEOUT = 30


def address(name: str) -> str:
    """The address of a model's weights, a file of this version's release in the repository of the package."""
    urls = dict(line.split(", ", 1) for line in metadata("purify-fast").get_all("Project-URL", ()))
    return f"{urls['Repository']}/releases/download/v{__version__}/{name}.safetensors"


def kept_folder(name: str, size: int, sha256: str) -> Path:
    """The folder with the weights of a model in the user's cache folder. Missing weights are downloaded.

    Args:
        name: name of the model in the zoo.
        size: size of its file in bytes.
        sha256: SHA-256 of its file. Another file raises a ValueError, and is not kept after a download.
    """
    path = cache_folder() / "zoo" / name / MODEL
    if path.is_file():
        check(path.read_bytes(), sha256, name, str(path))
        return path.parent
    source = address(name)
    print(f"purify_fast downloads the model {name} ({size:,} bytes) from {source} to {path}", file=sys.stderr)
    try:
        with urllib.request.urlopen(source, timeout=TIMEOUT) as answer:
            data = answer.read(size + 1)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"the model {name} of the zoo is not on this machine, and {source} cannot be read: {error}. Put its file, "
            f"which is purify_fast/zoo/models/{name}/{MODEL} in a clone of the repository, at {path}"
        ) from error
    check(data, sha256, name, source)
    with atomic(path) as temporary:
        temporary.write_bytes(data)
    return path.parent


def check(data: bytes, sha256: str, name: str, source: str) -> None:
    """Raise a ValueError if the bytes from a source are not the weights of a model."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{source} is not the file of the zoo's model {name}: SHA-256 must be {sha256}, got {found}")
