"""Read images from tar shards in WebDataset's form.

The files of a sample have the same path up to the first dot of the file name, such as ``a/01.jpg`` and ``a/01.cls``.
A shard is not unpacked. Its headers are read once. Then every image has a fixed number, the same in all processes and
resumed runs, and can be read from its place in the file in any order.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._files import atomic
from .._tensors import text_hash

#: The file name extension of labels in WebDataset. The file contains a number as text.
LABEL = "cls"
#: Description of a folder of shards, for messages.
FORM = (
    "train/*.tar, and val/*.tar or test/*.tar, in WebDataset's form: beside each image <name>.jpg or <name>.png is a "
    "file <name>.cls with its label, a number"
)


class Member(NamedTuple):
    """An image in a shard.

    Args:
        shard: path of the shard.
        name: name of the image in the shard, for messages.
        offset: position of the image's first byte in the shard.
        size: number of bytes.
    """

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    def read(self) -> bytes:
        """Read the bytes of the image."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def shards_of(folder: Path) -> list[Path]:
    """The shards in a folder, sorted. The list is empty if the folder has no shards."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def members(shards: list[Path], suffixes: tuple[str, ...], index: Path) -> tuple[list[Member], list[int]]:
    """List the images of shards and their labels, in the order in which the shards contain them.

    Args:
        shards: paths of the shards.
        suffixes: allowed endings of the images' names.
        index: path of a file with the result, so that the headers are read only once. The file is written if it is
            missing, or if the shards have changed.

    Raises:
        ValueError: a shard is not an uncompressed tar file, an image has no label, or a label has no image.
    """
    facts = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shards]
    source = text_hash(json.dumps(facts)).hexdigest()
    try:
        with np.load(index) as kept:
            if str(kept["source"]) == source:
                return _listed([kept[f"arr_{k}"] for k in range(5)], shards)
    except (OSError, ValueError, KeyError):
        pass
    found = [(number, *one) for number, path in enumerate(shards) for one in _samples(path, suffixes)]
    if not found:
        raise ValueError(f"the shards in {shards[0].parent} contain no image ({', '.join(suffixes)})")
    # The columns are shard, name, offset, size and label.
    columns = [np.array([one[k] for one in found]) for k in range(5)]
    index.parent.mkdir(parents=True, exist_ok=True)
    with atomic(index) as temporary, temporary.open("wb") as file:
        np.savez(file, *columns, source=np.array(source))
    return _listed(columns, shards)


def _listed(columns: list[np.ndarray], shards: list[Path]) -> tuple[list[Member], list[int]]:
    numbers, names, offsets, sizes, labels = (column.tolist() for column in columns)
    places = zip(numbers, names, offsets, sizes, strict=True)
    return [Member(shards[i], name, offset, size) for i, name, offset, size in places], labels


def _samples(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, int, int, int]]:
    """Yield the name, offset, size and label of each image of a shard."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        # The mode "r:" reads only uncompressed files. In these, a file has a position that can be read directly.
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                folder, _, last = member.name.rpartition("/")
                key, ending = f"{folder}/{last.partition('.')[0]}", last.lower().rpartition(".")[2]
                if f".{ending}" in suffixes:
                    if key in images:
                        raise ValueError(f"{path} has two images with the name {key.lstrip('/')!r}")
                    images[key] = member
                elif ending == LABEL:
                    content = shard.extractfile(member)
                    assert content is not None
                    text = content.read().strip()
                    if not text.isdigit():
                        raise ValueError(
                            f"{path}:{member.name} must contain a label, which is a number of at least 0, "
                            f"got {text[:40]!r}"
                        )
                    labels[key] = int(text)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not an uncompressed tar file: {error}") from error
    if images.keys() != labels.keys():
        lacking = min(images.keys() ^ labels.keys())
        what = "label (.cls)" if lacking in images else "image"
        raise ValueError(f"{path}: {lacking.lstrip('/')!r} has no {what}. The form of shards is {FORM}")
    for key, member in images.items():
        yield member.name, member.offset_data, member.size, labels[key]
