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


def address(name: str) -> str:
    """The address of a model's weights, a file of this version's release in the repository of the package."""
    urls = dict(line.split(", ", 1) for line in metadata("purify-fast").get_all("Project-URL", ()))
    if "Repository" not in urls:
        raise FileNotFoundError(f"the installed purify-fast does not name its repository, which has the model {name}")
    return f"{urls['Repository']}/releases/download/v{__version__}/{name}.safetensors"


def kept_folder(name: str, size: int, sha256: str) -> Path:
    """The folder with the weights of a model in the user's cache folder. Missing weights are downloaded.

    A file with another SHA-256 raises a ValueError, and is not kept after a download.
    """
    path = cache_folder() / "zoo" / name / MODEL
    kept = path.is_file()
    source = path if kept else address(name)
    data = path.read_bytes() if kept else downloaded(name, size, str(source), path)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        cure = ". Remove this file" if kept else ""
        text = f"{source} is not the file of the zoo's model {name}: SHA-256 must be {sha256}, got {found}{cure}"
        raise ValueError(text)
    if not kept:
        with atomic(path) as temporary:
            temporary.write_bytes(data)
    return path.parent


def downloaded(name: str, size: int, source: str, path: Path) -> bytes:
    """Download the weights of a model that belong at a path, and say so on stderr."""
    print(f"purify_fast downloads the model {name} ({size:,} bytes) from {source} to {path}", file=sys.stderr)
    try:
        # A server that is silent for 30 seconds is an error. One byte more than the size shows a file that is too long.
        with urllib.request.urlopen(source, timeout=30) as answer:
            return bytes(answer.read(size + 1))
    except (OSError, HTTPException) as error:
        clone = f"the file purify_fast/zoo/models/{name}/{MODEL} of a clone of the repository"
        raise FileNotFoundError(f"{source} cannot be read: {error}; copy {clone} to {path}") from error
