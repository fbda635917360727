"""Read image folders and tar shards.

The images are decoded once into a cache of uint8 arrays, or whenever an image is read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import BaseFileLock, FileLock
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import make_dataset
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from .._files import atomic, write_text
from .._memory import available_memory
from .._tensors import content_hash, text_hash
from .shards import FORM as FORM_OF_SHARDS
from .shards import Member, members, shards_of
from .streaming import GIVE_SIZE, StreamedImages

logger = logging.getLogger("purify_fast")

SUFFIXES = (".jpg", ".jpeg", ".png")
CACHE = ".purify_fast"
#: Version of the cache. If a cache has another version, the images are decoded again.
FORMAT = 1
#: The largest number of files or classes that a message names.
NAMED = 10
#: Modes of Pillow with 8 bits or less per channel.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
#: Number of images for each thread that are decoded ahead and kept in memory.
CHUNK = 32
FORM = (
    "train/<class>/*.jpg|png and val/ or test/ in the same form, or tiny-imagenet-200's val/images and "
    f"val/val_annotations.txt, or {FORM_OF_SHARDS}"
)


class Split(NamedTuple):
    """The paths of N images, or their places in shards, and their labels, int64 ``[N]``."""

    files: Sequence[Path | Member]
    labels: Tensor


#: For each split, a pair: the decoded images, and the error of each image that was left out. The key of an error is the
#: number of the image among the files.
Cached = dict[str, tuple[StreamedImages, dict[int, str]]]


def read_folder(
    folder: Path,
    image_size: tuple[int, int] | None,
    *,
    stream: bool,
    decode_once: bool,
    cache: Path | None,
    workers: int | None,
    on_bad_image: str,
    follow_links: bool,
) -> tuple[dict[str, Tensor | StreamedImages], dict[str, Tensor], int]:
    """Read the images of an image folder. If the cache is missing or the files have changed, decode the images first.

    The arguments are those of `purify_fast.data.load_dataset`. The classes are the sorted names of the folders in
    ``train``. The held-out images are those of ``val`` if it exists, or else those of ``test``.

    Returns:
        Three values: the images (RGB, uint8 ``[N, 3, H, W]``) and the labels (int64 ``[N]``), each by the keys
        ``train`` and ``test``, and the number of classes.

    Raises:
        FileNotFoundError: a required folder is missing.
        ValueError: a class has no images or does not occur in ``train``, a label is not allowed, an image cannot be
            decoded, or images differ in size and ``image_size`` is None.
        OSError: the cache cannot be written, or its disk has too little space.
    """
    root = folder / CACHE if cache is None else cache / folder.resolve().name
    splits, classes = _listed(folder, root)
    for split in splits.values():
        _check_links(folder, [_file(image) for image in split.files], follow_links)
    source = _fingerprint(folder, splits, classes)
    # On Linux this is the number of CPUs that this process may use.
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    count = cpus if workers is None else workers
    if decode_once:
        place = root / ("native" if image_size is None else f"{image_size[0]}x{image_size[1]}")
        cached = _opened(place, source, splits)
        if cached is None:
            with _locked(place):
                # Another process may have written the cache in the meantime.
                cached = _opened(place, source, splits) or _write(place, source, splits, image_size, workers=count)
    else:
        size = first_size(splits["train"].files) if image_size is None else image_size
        how: dict[str, Any] = {"resize": image_size is not None, "workers": count}
        cached = {
            part: (EncodedImages(split.files, size, f"{part} of {source}", **how), {}) for part, split in splits.items()
        }
    memory = available_memory() // 2
    x: dict[str, Tensor | StreamedImages] = {}
    y: dict[str, Tensor] = {}
    # Begin with the held-out images, because an evaluation needs all of them in memory.
    for part in ("test", "train"):
        images, left_out = cached[part]
        if left_out:
            text = f"{len(left_out)} of {len(splits[part].files)} images of {folder} cannot be decoded"
            names = "; ".join(list(left_out.values())[:NAMED]) + ("; ..." if len(left_out) > NAMED else "")
            if on_bad_image == "refuse" or not len(images):
                advice = "Replace or remove them, or skip them with on_bad_image='skip' (--on-bad-image skip)"
                raise ValueError(f"{text}. {advice}. The errors are: {names}")
            logger.warning("%s and are left out: %s", text, names)
        needed = images.shape.numel()
        streamed = stream or needed > memory
        memory -= 0 if streamed else needed
        x[part] = images if streamed else images[:]
        y[part] = torch.from_numpy(np.delete(splits[part].labels.numpy(), list(left_out)))
    return x, y, len(classes)


# ---- the files of an image folder


def _file(image: Path | Member) -> Path:
    return image.shard if isinstance(image, Member) else image


def _classes_in(folder: Path) -> list[str]:
    # torchvision's find_classes would treat a hidden folder, such as the folder of an editor, as a class.
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _listed(folder: Path, index: Path) -> tuple[dict[str, Split], list[str]]:
    """The two splits and the names of the classes. The index of shards is kept in the folder ``index``."""
    held_out = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if held_out is None or not (folder / "train").is_dir():
        lacks = "train/" if held_out is not None else "val/ and test/"
        raise FileNotFoundError(f"{folder} is not an image folder: it lacks {lacks}. It must contain {FORM}")
    if shards_of(folder / "train"):
        if not shards_of(held_out):
            raise FileNotFoundError(f"{held_out} has no shards, but train has shards. It must contain {FORM_OF_SHARDS}")
        splits = {}
        for part, place in {"train": folder / "train", "test": held_out}.items():
            images, labels = members(shards_of(place), SUFFIXES, index / f"shards_{part}.npz")
            splits[part] = Split(images, torch.tensor(labels, dtype=torch.int64))
        highest = int(splits["train"].labels.max())
        if int(splits["test"].labels.max()) > highest:
            raise ValueError(f"{held_out} has labels above {highest}, which is the largest label of train")
        return splits, [str(label) for label in range(highest + 1)]
    classes = _classes_in(folder / "train")
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'} must contain a folder for each of at least 2 classes, got {classes}")
    annotations = held_out / "val_annotations.txt"
    test = _annotated(annotations, classes) if annotations.is_file() else _by_class(held_out, classes, every=False)
    return {"train": _by_class(folder / "train", classes, every=True), "test": test}, classes


def _check_links(folder: Path, files: list[Path], follow: bool) -> None:
    """Raise a ValueError for a circular link. If ``follow`` is False, also for a link that points out of the folder."""
    root = folder.resolve()
    # There may be a million files, so resolve each folder only once.
    real = {parent: parent.resolve() for parent in {path.parent for path in files}}
    links = {place for parent in real for place in (parent, *parent.parents) if place != folder and place.is_symlink()}
    for link in sorted(links):
        if link.is_relative_to(folder) and link.parent.resolve().is_relative_to(link.resolve()):
            raise ValueError(f"{link} links to a folder that contains it, so images would repeat: remove the link")
    if follow:
        return
    for path in files:
        target = path.resolve() if path.is_symlink() else real[path.parent]
        if not target.is_relative_to(root):
            raise ValueError(
                f"{path} leads out of {folder}, to {target}, by a symbolic link: remove the link, or allow such links "
                "with follow_links=True (--follow-links)"
            )


def _by_class(folder: Path, classes: list[str], every: bool) -> Split:
    unknown = sorted(set(_classes_in(folder)) - set(classes))
    if unknown:
        raise ValueError(f"{folder} has the classes {', '.join(unknown[:NAMED])}, which train lacks")
    numbered = {name: label for label, name in enumerate(classes)}
    listed = make_dataset(folder, numbered, SUFFIXES, allow_empty=True)
    # Sort by path within a class. torchvision would list the files of a folder before the files of its subfolders.
    samples = sorted((label, Path(path)) for path, label in listed if not os.path.basename(path).startswith("."))
    labels = torch.tensor([label for label, _ in samples], dtype=torch.int64)
    empty = [name for label, name in enumerate(classes) if label not in labels]
    if every and empty:
        raise ValueError(f"{folder / empty[0]} contains no image ({', '.join(SUFFIXES)})")
    if not samples:
        raise ValueError(f"{folder} contains no image ({', '.join(SUFFIXES)}) in a folder of its class")
    return Split([path for _, path in samples], labels)


def _annotated(path: Path, classes: list[str]) -> Split:
    """Read the list of held-out images of tiny-imagenet-200. A line has a file name, a class and a box, with tabs."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or row[1] not in classes:
            raise ValueError(f"{path}, line {number}: expected a file name, a tab and a class of train, got {row}")
    if not rows:
        raise ValueError(f"{path} contains no image names")
    return Split(
        [path.parent / "images" / row[0] for row in rows], torch.tensor([classes.index(row[1]) for row in rows])
    )


def _fingerprint(folder: Path, splits: dict[str, Split], classes: list[str]) -> str:
    """A hash of the names, sizes, times and labels of the files."""
    content = text_hash(json.dumps([FORMAT, classes]))
    looked = functools.cache(Path.stat)
    for part, split in splits.items():
        for image, label in zip(split.files, split.labels.tolist(), strict=True):
            path = _file(image)
            facts, name = looked(path), path.relative_to(folder).as_posix()
            name += f":{image.name}" if isinstance(image, Member) else ""
            content.update(json.dumps([part, name, facts.st_size, facts.st_mtime_ns, label]).encode())
    return content.hexdigest()


# ---- the cache: <place>/x_train-<source>.npy, x_test-<source>.npy, and set.json, which is written last


def _array(place: Path, part: str, source: str) -> Path:
    return place / f"x_{part}-{source[:16]}.npy"


def _opened(place: Path, source: str, splits: dict[str, Split]) -> Cached | None:
    """The cached images of exactly these files; None if the cache is missing or has other files."""
    try:
        facts = json.loads((place / "set.json").read_text())
        if facts["source"] != source:
            return None
        cached = {}
        for part, split in splits.items():
            left_out = {int(number): text for number, text in facts["left_out"][part].items()}
            images = StreamedImages(_array(place, part, source), facts["digests"][part])
            if len(images) + len(left_out) != len(split.files):
                return None
            cached[part] = images, left_out
    except (OSError, ValueError, KeyError):
        return None
    return cached


def _locked(place: Path) -> contextlib.AbstractContextManager[BaseFileLock]:
    """A lock with which a single process writes the cache while others wait. It ends with the process."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        return FileLock(place / ".lock").acquire()
    except OSError as error:
        raise OSError(f"decoded images cannot be kept in {place} ({error}): give another folder as cache") from error


def _write(
    place: Path, source: str, splits: dict[str, Split], image_size: tuple[int, int] | None, *, workers: int
) -> Cached:
    (place / "set.json").unlink(missing_ok=True)
    # Remove files of other images and of killed processes.
    for old in [*place.glob("x_*.npy"), *place.glob(".x_*.npy")]:
        old.unlink()
    size = first_size(splits["train"].files) if image_size is None else image_size
    needed = sum(len(split.files) for split in splits.values()) * 3 * size[0] * size[1]
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"the decoded images need {needed} bytes, but {place} has {free} bytes free: give another folder as cache"
        )
    cached: Cached = {}
    for part, split in splits.items():
        path, resize, title = _array(place, part, source), image_size is not None, f"decode {part} images"
        with atomic(path) as temporary:
            left_out = decode(split.files, size, resize=resize, out=temporary, workers=workers, title=title)
        array = np.load(path, mmap_mode="r")
        content = content_hash(torch.uint8, array.shape)
        content.update(array.data)
        cached[part] = StreamedImages(path, content.hexdigest()), left_out
    digests = {part: images.digest for part, (images, _) in cached.items()}
    facts = {"source": source, "digests": digests, "left_out": {part: out for part, (_, out) in cached.items()}}
    write_text(place / "set.json", json.dumps(facts))
    return cached


# ---- decoding


def first_size(files: Sequence[Path | Member]) -> tuple[int, int]:
    """The height and width of the first image that can be decoded. Raises a ValueError if there is none."""
    for path in files:
        image = _image(path, None)
        if not isinstance(image, str):
            return image.shape[1], image.shape[2]
    raise ValueError(
        f"none of the {len(files)} training images can be decoded; the first error is: {_image(files[0], None)}"
    )


def decode(
    files: Sequence[Path | Member], size: tuple[int, int], *, resize: bool, out: Path, workers: int, title: str
) -> dict[int, str]:
    """Decode images into an ``.npy`` file, uint8 ``[N, 3, H, W]``. Only a part of the images is in memory at a time.

    Args:
        files: the images, in the order in which they are written.
        size: height and width of the images in the file.
        resize: whether to resize and crop the images to this size. Otherwise an image of another size is an error.
        out: path of the file to write.
        workers: number of threads that decode.
        title: text of the progress bar.

    Returns:
        For each image that cannot be decoded, and is left out, its number among the files and the error.

    Raises:
        ValueError: an image has another size.
    """
    bar = tqdm(total=len(files), unit="img", desc=title, mininterval=0.1 if sys.stderr.isatty() else 10)
    failed: dict[int, str] = {}
    with bar, out.open("wb") as file:
        _write_header(file, len(files), size)
        for number, image in enumerate(_decoded(files, size, resize=resize, workers=workers)):
            bar.update()
            if isinstance(image, str):
                failed[number] = image
            else:
                file.write(image.tobytes())
        file.seek(0)
        _write_header(file, len(files) - len(failed), size)
    return failed


def _write_header(file: BinaryIO, count: int, size: tuple[int, int]) -> None:
    # The header has the same length for every count, because NumPy pads it.
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, *size)}
    np.lib.format.write_array_header_1_0(file, header)


def _decoded(
    files: Sequence[Path | Member], size: tuple[int, int], *, resize: bool, workers: int
) -> Iterator[np.ndarray | str]:
    """Yield the image or the error of each file, in order. Only a limited number of images is decoded ahead.

    The arguments are those of `decode`. Pillow lets other threads run while it decodes an image.
    """
    threads, target = max(workers, 1), size if resize else None
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(files), CHUNK * threads):
            part = files[first : first + CHUNK * threads]
            for path, image in zip(part, pool.map(_image, part, repeat(target)), strict=True):
                if not isinstance(image, str) and image.shape[1:] != size:
                    got = " x ".join(map(str, image.shape[1:]))
                    raise ValueError(f"{path} has {got} pixels, but others have {size[0]} x {size[1]}: {GIVE_SIZE}")
                yield image


def _image(path: Path | Member, size: tuple[int, int] | None) -> np.ndarray | str:
    """Decode an image to RGB, uint8 ``[3, H, W]``, or return an error text that names the file.

    Transparency and the orientation in the metadata of a photo are ignored.
    """
    try:
        with Image.open(BytesIO(path.read()) if isinstance(path, Member) else path) as file:
            if file.mode not in MODES:
                return f"{path}: its mode is {file.mode}, not one of {', '.join(MODES)}"
            image = file.convert("RGB")
    # A damaged file may raise any error.
    except Exception as error:
        return f"{path}: {error}"
    if size is not None:
        # torchvision's Resize with the length of the shorter side would not always cover a target that is not square.
        (height, width), sides = size, (image.height, image.width)
        wide = height * sides[1] < width * sides[0]
        covering = [sides[0] * width // sides[1], width] if wide else [height, sides[1] * height // sides[0]]
        image = functional.center_crop(functional.resize(image, covering), list(size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class EncodedImages(StreamedImages):
    """JPEG or PNG images that several threads decode whenever they are read.

    Decoded images may need too much space: ImageNet's 1.28 million training images need 193 GB at 224 x 224 pixels. The
    pixels are the same as those of images that are decoded once.

    Args:
        files: the images, which are files or parts of shards. They must not change while this object is used.
        size: height and width of the images that are read.
        digest: hash of the images, which `purify_fast._tensors.digest` uses in place of the images.
        resize: whether to resize and crop the images to this size. Otherwise an image of another size is an error.
        workers: number of threads that decode.
    """

    device = torch.device("cpu")

    def __init__(
        self, files: Sequence[Path | Member], size: tuple[int, int], digest: str, *, resize: bool, workers: int
    ):
        self.files, self.size, self.resize, self.workers = files, size, resize, workers
        self.shape = torch.Size((len(files), 3, *size))
        self.digest = f"{digest} at {size[0]} x {size[1]}"

    def read(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        images = torch.empty((len(ids), *self.shape[1:]), dtype=torch.uint8) if out is None else out
        files = [self.files[number] for number in ids.tolist()]
        for row, image in enumerate(_decoded(files, self.size, resize=self.resize, workers=self.workers)):
            if isinstance(image, str):
                raise ValueError(f"an image cannot be decoded: {image}; replace it, or remove it and start again")
            images[row] = torch.from_numpy(image)
        return images
