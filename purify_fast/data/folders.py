"""Read image folders. Images are decoded once, into a cache of uint8 arrays, or each time they are read."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from .._files import atomic, write_text
from .._memory import available_memory
from .._tensors import content_hash, text_hash
from .streaming import GIVE_SIZE, StreamedImages

#: The endings of image files, as in torchvision's ImageFolder.
SUFFIXES = IMG_EXTENSIONS
CACHE = ".purify_fast"
#: The largest number of files or classes that a message names.
NAMED = 10
#: Modes of Pillow with 8 bits or less per channel.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
#: Number of images per thread that are decoded ahead of their use. They remain in memory until then.
CHUNK = 32
FORM = (
    "train/<class>/*.jpg (or .png, .webp and others), and the held-out images: val/ or test/ in the same form, or "
    "val/images and val/val_annotations.txt as in tiny-imagenet-200"
)


class Split(NamedTuple):
    """The paths of N images, and their labels, int64 ``[N]``."""

    files: list[Path]
    labels: Tensor


def read_folder(
    folder: Path,
    image_size: tuple[int, int] | None,
    *,
    train: bool,
    stream: bool,
    decode_once: bool,
    skip_broken: bool,
    cache: Path | None,
    workers: int | None,
) -> tuple[dict[str, Tensor | StreamedImages], dict[str, Tensor], list[str]]:
    """Read the images of an image folder, their labels, and the names of the classes."""
    root = folder / CACHE if cache is None else cache / folder.resolve().name
    splits, classes = _listed(folder, train)
    # On Linux this is the number of CPUs that this process may use.
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    count = cpus if workers is None else max(workers, 1)
    if skip_broken:
        splits = _without_broken(root, splits, classes, workers=count)
    _warn_of_classes(folder, classes, splits["test"].labels)
    size = first_size(next(iter(splits.values())).files) if image_size is None else image_size
    how: dict[str, Any] = {"resize": image_size is not None, "workers": count}
    images: dict[str, StreamedImages]
    if decode_once:
        place = root / ("native" if image_size is None else f"{size[0]}x{size[1]}")
        images = _cached(place, splits, size, **how)
    else:
        images = {part: EncodedImages(split.files, size, _source(split.files), **how) for part, split in splits.items()}
    memory = available_memory() // 2
    x: dict[str, Tensor | StreamedImages] = {"train": torch.empty((0, 3, *size), dtype=torch.uint8)}
    # Begin with the held-out images, because an evaluation needs all of them in memory.
    for part in reversed(splits):
        needed = images[part].shape.numel()
        streamed = stream or needed > memory
        memory -= 0 if streamed else needed
        x[part] = images[part] if streamed else images[part][:]
    y = {part: splits[part].labels if part in splits else torch.empty(0, dtype=torch.int64) for part in x}
    return x, y, classes


# ---- the files of an image folder


def is_hidden(path: str | Path, folder: Path) -> bool:
    """Tell whether a name below ``folder`` in a path begins with a dot, or is that of Synology's small copies."""
    return any(name.startswith((".", "@eaDir")) for name in Path(path).relative_to(folder).parts)


def classes_in(folder: Path) -> list[str]:
    """The names of the classes of a folder, in the order of their labels."""
    # torchvision's find_classes would treat a hidden folder, such as the folder of an editor, as a class.
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path, folder))


def _listed(folder: Path, train: bool) -> tuple[dict[str, Split], list[str]]:
    """The splits and the names of the classes. Without ``train``, only the names of the folders in train/ are read."""
    held_out = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    trained = folder / "train"
    if held_out is None or (train and not trained.is_dir()):
        lacks = "train/" if held_out is not None else "val/ and test/"
        raise FileNotFoundError(f"{folder} is not an image folder: it lacks {lacks}. It must contain {FORM}")
    if (annotations := held_out / "val_annotations.txt").is_file():
        # In each line of this file of tiny-imagenet-200, tabs separate a file name, a class and a box.
        rows = [[*line.split("\t"), ""] for line in annotations.read_text().splitlines()]
        listed = {"test": [(row[1], held_out / "images" / row[0]) for row in rows]}
        classes = sorted({row[1] for row in rows})
    else:
        listed, classes = {"test": _by_class(held_out)}, classes_in(held_out)
    classes = classes_in(trained) if trained.is_dir() else classes
    if len(classes) < 2:
        raise ValueError(f"{trained} must contain a folder for each of at least 2 classes, got {classes}")
    listed = ({"train": _by_class(trained)} if train else {}) | listed
    found = {part: {name for name, _ in images} for part, images in listed.items()}
    if unknown := sorted(found["test"] - set(classes)):
        raise ValueError(f"{held_out} has the classes {_some(unknown)}, which the folder train/ lacks")
    empty = [trained / name for name in classes if train and name not in found["train"]]
    if empty or not found["test"]:
        raise ValueError(f"{[*empty, held_out][0]} contains no image of a class ({', '.join(SUFFIXES)})")
    label = {name: number for number, name in enumerate(classes)}
    splits = {
        part: Split([path for _, path in images], torch.tensor([label[name] for name, _ in images], device="cpu"))
        for part, images in listed.items()
    }
    return splits, classes


def _by_class(folder: Path) -> list[tuple[str, Path]]:
    """The images in the folders of classes, each with the name of its class."""
    names = classes_in(folder)
    numbered = {name: number for number, name in enumerate(names)}
    listed = make_dataset(folder, numbered, SUFFIXES, allow_empty=True) if names else []
    # Sort by path within a class. torchvision would list the files of a folder before the files of its subfolders.
    shown = sorted((number, Path(path)) for path, number in listed if not is_hidden(path, folder))
    return [(names[number], path) for number, path in shown]


def _warn_of_classes(folder: Path, classes: list[str], held_out: Tensor) -> None:
    absent = [name for label, name in enumerate(classes) if label not in held_out]
    if absent:
        warnings.warn(
            f"{len(absent)} of the {len(classes)} classes of {folder} have no held-out image ({_some(absent)}): "
            "accuracies on held-out images say nothing about them",
            stacklevel=4,
        )
    numbers = [(name, label) for label, name in enumerate(classes) if name.isdecimal() and int(name) != label]
    if numbers:
        warnings.warn(
            f"labels are places in the sorted names of the folders, not the numbers that these names are: {folder} has "
            f"{_some(f'the folder {name} with the label {label}' for name, label in numbers)}. For a model that was "
            "trained with the numbers as labels, count the folders from 0, with zeros in front (00, 01, ..., 10)",
            stacklevel=4,
        )


def _source(files: Sequence[Path]) -> str:
    """A hash of the names, sizes and modification times of files."""
    content, shared = text_hash(), len(os.path.commonpath(files))
    for path in files:
        try:
            facts = path.stat()
            known = [facts.st_size, facts.st_mtime_ns]
        except OSError:
            # A link to a missing file is an image that cannot be decoded.
            known = []
        content.update(json.dumps([str(path)[shared:], *known]).encode())
    return content.hexdigest()


def _without_broken(root: Path, splits: dict[str, Split], classes: list[str], workers: int) -> dict[str, Split]:
    """Leave out the images that cannot be decoded, with a warning. They are found once, and kept in a file."""
    kept, errors = dict[str, Split](), list[str]()
    for part, (files, labels) in splits.items():
        place, broken = root / f"broken_{part}-{_source(files)[:16]}.json", None
        with contextlib.suppress(OSError, ValueError):
            broken = dict[int, str](json.loads(place.read_text()))
        if broken is None:
            images = _bar(_decoded(files, None, resize=False, workers=workers), len(files), f"check {part} images")
            broken = {number: image for number, image in enumerate(images) if isinstance(image, str)}
            root.mkdir(parents=True, exist_ok=True)
            write_text(place, json.dumps(list(broken.items())))
        ids = [number for number in range(len(files)) if number not in broken]
        kept[part] = Split([files[number] for number in ids], labels[ids])
        errors += broken.values()
    if errors:
        total = sum(len(split.files) for split in splits.values())
        warnings.warn(f"{len(errors)} of {total} images are left out: {_some(errors)}", stacklevel=4)
    empty = [name for label, name in enumerate(classes) if "train" in kept and label not in kept["train"].labels]
    if empty or not kept["test"].files:
        what = f"the class {empty[0]} of train" if empty else "the held-out images"
        raise ValueError(f"no image of {what} can be decoded: replace them. The errors are: {_some(errors)}")
    return kept


def _some(texts: Iterable[str]) -> str:
    """The first texts."""
    first = list(islice(texts, NAMED + 1))
    return "; ".join(first[:NAMED]) + ("; ..." if len(first) > NAMED else "")


# ---- the cache: for each part, x_<part>-<hash of `_source`>-<hash of the pixels>.npy


def _cached(
    place: Path, splits: dict[str, Split], size: tuple[int, int], *, resize: bool, workers: int
) -> dict[str, StreamedImages]:
    """Open the decoded images of exactly these files. If they are missing, decode them first."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / ".lock").acquire()
    except OSError as error:
        raise OSError(f"decoded images cannot be kept in {place} ({error}): give another folder as cache") from error
    images, failed = dict[str, StreamedImages](), list[str]()
    # The process that has the lock writes the cache, and the others wait for it.
    with lock:
        for part, (files, _) in splits.items():
            whole = place / f"x_{part}-{_source(files)[:16]}.npy"
            for path in place.glob(f"{whole.stem}-*.npy"):
                with contextlib.suppress(OSError, ValueError):
                    images[part] = StreamedImages(path, path.stem.rpartition("-")[2])
            if part in images:
                continue
            # Remove the arrays of an earlier cache, and the temporary files of killed processes.
            for old in place.glob(f"*x_{part}-*.npy"):
                old.unlink()
            with atomic(whole) as temporary:
                title = f"decode {part} images"
                pixels, errors = decode(files, size, resize=resize, out=temporary, workers=workers, title=title)
            if errors:
                whole.unlink()
                failed += errors
                continue
            images[part] = StreamedImages(whole.rename(place / f"{whole.stem}-{pixels}.npy"), pixels)
    if failed:
        total = sum(len(split.files) for split in splits.values())
        raise ValueError(
            f"{len(failed)} of {total} images cannot be decoded: replace or remove them, or leave them out by "
            f"broken='skip' (--broken skip). The errors are: {_some(failed)}"
        )
    return images


# ---- decoding


def first_size(files: Sequence[Path]) -> tuple[int, int]:
    """The height and width of the first image that can be decoded. Raises a ValueError if there is none."""
    for path in files:
        image = _image(path, None)
        if not isinstance(image, str):
            return image.shape[1], image.shape[2]
    raise ValueError(f"none of {len(files)} images can be decoded, the first is {files[0]}")


def decode(
    files: Sequence[Path], size: tuple[int, int], *, resize: bool, out: Path, workers: int, title: str
) -> tuple[str, list[str]]:
    """Decode images in parts to an ``.npy`` file, uint8 ``[N, 3, H, W]``; return the hash of the pixels, and errors."""
    shape, failed = (len(files), 3, *size), list[str]()
    content = content_hash(torch.uint8, shape)
    # The images are written one after another: a full disk ends a write with an OSError, but a memory map with SIGBUS.
    with out.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for image in _bar(_decoded(files, size, resize=resize, workers=workers), len(files), title):
            if isinstance(image, str):
                failed.append(image)
            elif not failed:
                content.update(image.data)
                file.write(image.data)
    return content.hexdigest(), failed


def _bar(images: Iterator[np.ndarray | str], total: int, title: str) -> Iterator[np.ndarray | str]:
    return iter(tqdm(images, title, total, unit="img", mininterval=0.1 if sys.stderr.isatty() else 10))


def _decoded(
    files: Sequence[Path], size: tuple[int, int] | None, *, resize: bool, workers: int
) -> Iterator[np.ndarray | str]:
    """Yield the image or the error of each file, in order, with a limited number of images decoded ahead."""
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(files), CHUNK * workers):
            part = files[first : first + CHUNK * workers]
            for path, image in zip(part, pool.map(_image, part, repeat(size if resize else None)), strict=True):
                if size is not None and not isinstance(image, str) and image.shape[1:] != size:
                    got = " x ".join(map(str, image.shape[1:]))
                    raise ValueError(f"{path} has {got} pixels, but others have {size[0]} x {size[1]}: {GIVE_SIZE}")
                yield image


def _image(path: Path, size: tuple[int, int] | None) -> np.ndarray | str:
    """Decode an image to RGB, uint8 ``[3, H, W]``, or return an error text that names the file."""
    try:
        with Image.open(path) as file:
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


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Decode an image file to RGB, uint8 ``[3, H, W]``, as `purify_fast.data.load_dataset` does for an image folder.

    Args:
        path: a JPEG, PNG or another file of an image. Transparency and the orientation in the metadata are ignored.
        size: height and width. The image is resized until it just covers this size, and its center is cropped. None
            keeps the size of the image.

    Raises:
        ValueError: the file cannot be decoded.
    """
    image = _image(Path(path), size)
    if isinstance(image, str):
        raise ValueError(f"the image cannot be decoded: {image}")
    return torch.from_numpy(image)


class EncodedImages(StreamedImages):
    """Files of images that several threads decode whenever they are read."""

    device = torch.device("cpu")

    def __init__(self, files: Sequence[Path], size: tuple[int, int], digest: str, *, resize: bool, workers: int):
        self.files, self.size, self.resize, self.workers = files, size, resize, workers
        self.shape = torch.Size((len(files), 3, *size))
        self.digest = f"{digest} at {size[0]} x {size[1]}"

    def read(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        images = torch.empty((len(ids), *self.shape[1:]), dtype=torch.uint8, device="cpu") if out is None else out
        files = [self.files[number] for number in ids.tolist()]
        for row, image in enumerate(_decoded(files, self.size, resize=self.resize, workers=self.workers)):
            if isinstance(image, str):
                raise ValueError(f"an image cannot be decoded: {image}; replace it, or remove it and start again")
            images[row] = torch.from_numpy(image)
        return images
