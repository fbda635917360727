"""A hash of the C++ sources, by which an extension is known to be of a checkout's sources and not of older ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

#: The record that building the extension leaves beside it.
RECORD = "_build.json"
#: The folders of the sources that the extension is made of.
PARTS = ("core", "cpu")
#: Files by which these folders are known: others have a folder ``csrc`` too, which may lie in ``site-packages``.
MARKS = ("core/philox.h", "cpu/philox.cpp")


def digest(folder: Path) -> str:
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
    """Whether an extension was built from other sources than those of a checkout.

    Its ops may then take other arguments than this package's Python gives them.

    Args:
        extension: the shared object, whose record lies beside it.
        folder: ``csrc`` of the checkout; where there is none, as in an installed wheel, nothing is stale.
    """
    if not all((folder / name).is_file() for name in MARKS):
        return False
    try:
        record = json.loads(extension.with_name(RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    return not isinstance(record, dict) or record.get("sources") != digest(folder)
