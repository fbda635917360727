"""Read and write safetensors files with tensors, JSON values and a checksum of both, compared at every reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ._files import atomic
from ._hashes import digest, text_hash

#: The only key of a file's metadata, for a checksum, a space, and JSON: several entries would have no fixed order.
_ENTRY = "purify_fast"


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return text_hash(json.dumps([text, names, digest(*(tensors[name] for name in names))])).hexdigest()


def write_sealed(path: Path, content: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and a JSON value to one safetensors file, atomically."""
    # safetensors refuses tensors that share memory, so clone them.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(content)
    data = save(copies, {_ENTRY: f"{_checksum(text, copies)} {text}"})
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def read_sealed(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Read the JSON value and the tensors that `write_sealed` wrote."""
    # Open the file only once, because another process may replace it at any time. safetensors.safe_open opens it twice.
    data = path.read_bytes()
    try:
        tensors = load(data)
        # A safetensors file begins with 8 bytes for the length of its header. The JSON header and the tensors follow.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        checksum, _, text = header["__metadata__"][_ENTRY].partition(" ")
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"the file is cut off or damaged, or another program wrote it ({error!r})") from error
    if checksum != _checksum(text, tensors):
        raise ValueError("the checksum does not match the content: the file changed after it was written")
    return json.loads(text), tensors
