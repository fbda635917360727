"""The files in which an evaluation keeps what it found: each has a checksum, so that a damaged one is found out.

A file that is damaged is as good as absent: what it held is computed again, and a warning says so.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._files import atomic, write_text
from .._fingerprint import text_hash

logger = logging.getLogger("purify_fast")

#: What stands between the arrays of a file and their checksum. A reader of zip files takes both for a comment.
_MARK = b"\nchecksum "


def write_values(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as JSON; the file is whole or absent.

    Args:
        path: the file.
        values: what `json` can write, without NaN.
    """
    text = json.dumps(values, allow_nan=False)
    write_text(path, f'{{"checksum": "{text_hash(text).hexdigest()}", "values": {text}}}')


def read_values(path: Path) -> dict[str, Any] | None:
    """The values that `write_values` wrote; None where the file is absent or damaged.

    Args:
        path: the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"values", "checksum"} <= content.keys():
            logger.warning(
                "%s has no checksum: it is damaged, or another version of the package wrote it; what it held is "
                "computed again", path
            )  # fmt: skip
            return None
        values = content["values"]
        if text_hash(json.dumps(values, allow_nan=False)).hexdigest() == content["checksum"]:
            return values
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        # told below
        pass
    _tell(path)
    return None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as numpy does; the file is whole or absent.

    Args:
        path: the file, ``.npz``.
        arrays: by their names.
    """
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    data = content.getvalue()
    with atomic(path) as temporary:
        temporary.write_bytes(data + _MARK + _checksum(data))


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays that `write_arrays` wrote; None where the file is absent or damaged.

    Args:
        path: the file.
    """
    try:
        data, mark, checksum = path.read_bytes().rpartition(_MARK)
        if mark and checksum == _checksum(data):
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except OSError:
        # told below
        pass
    _tell(path)
    return None


def _checksum(data: bytes) -> bytes:
    found = text_hash()
    found.update(data)
    return found.hexdigest().encode()


def _tell(path: Path) -> None:
    logger.warning("%s is damaged: its checksum is not that of its content; what it held is computed again", path)
