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

    files: Sequence[Path]
    labels: Tensor


def read_folder(
    folder: Path,
    image_size: tuple[int, int] | None,
    *,
    stream: bool,
    decode_once: bool,
    skip_broken: bool,
    cache: Path | None,
    workers: int | None,
) -> tuple[dict[str, Tensor | StreamedImages], dict[str, Tensor], int]:
    """Read the images of an image folder."""
    root = folder / CACHE if cache is None else cache / folder.resolve().name
    splits, classes = _listed(folder)
    # On Linux this is the number of CPUs that this process may use.
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    count = cpus if workers is None else max(workers, 1)
    if skip_broken:
        splits = _without(splits, _broken(folder, root, splits, workers=count), classes)
    source = _fingerprint(folder, splits, classes)
    absent = [name for label, name in enumerate(classes) if label not in splits["test"].labels]
    if absent:
        warnings.warn(
            f"{len(absent)} of the {len(classes)} classes of {folder} have no held-out image ({_some(absent)}): "
            "accuracies on held-out images say nothing about them",
            stacklevel=3,
        )
    size = first_size(splits["train"].files) if image_size is None else image_size
    how: dict[str, Any] = {"resize": image_size is not None, "workers": count}
    images: dict[str, StreamedImages]
    if decode_once:
        place = root / ("native" if image_size is None else f"{size[0]}x{size[1]}")
        images = _cached(place, source, splits, size, **how)
    else:
        images = {
            part: EncodedImages(split.files, size, f"{part} of {source}", **how) for part, split in splits.items()
        }
    memory = available_memory() // 2
    x: dict[str, Tensor | StreamedImages] = {}
    # Begin with the held-out images, because an evaluation needs all of them in memory.
    for part in ("test", "train"):
        needed = images[part].shape.numel()
        streamed = stream or needed > memory
        memory -= 0 if streamed else needed
        x[part] = images[part] if streamed else images[part][:]
    return x, {part: split.labels for part, split in splits.items()}, len(classes)


# ---- the files of an image folder


def _classes_in(folder: Path) -> list[str]:
    # torchvision's find_classes would treat a hidden folder, such as the folder of an editor, as a class.
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _listed(folder: Path) -> tuple[dict[str, Split], list[str]]:
    """The two splits and the names of the classes."""
    held_out = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if held_out is None or not (folder / "train").is_dir():
        lacks = "train/" if held_out is not None else "val/ and test/"
        raise FileNotFoundError(f"{folder} is not an image folder: it lacks {lacks}. It must contain {FORM}")
    classes = _classes_in(folder / "train")
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'} must contain a folder for each of at least 2 classes, got {classes}")
    annotations = held_out / "val_annotations.txt"
    test = _annotated(annotations, classes) if annotations.is_file() else _by_class(held_out, classes, every=False)
    return {"train": _by_class(folder / "train", classes, every=True), "test": test}, classes


def _by_class(folder: Path, classes: list[str], every: bool) -> Split:
    unknown = sorted(set(_classes_in(folder)) - set(classes))
    if unknown:
        raise ValueError(f"{folder} has the classes {_some(unknown)}, which the folder train/ lacks")
    numbered = {name: label for label, name in enumerate(classes)}
    listed = make_dataset(folder, numbered, SUFFIXES, allow_empty=True)
    # Sort by path within a class. torchvision would list the files of a folder before the files of its subfolders.
    samples = sorted((label, Path(path)) for path, label in listed if not os.path.basename(path).startswith("."))
    labels = torch.tensor([label for label, _ in samples], dtype=torch.int64, device="cpu")
    empty = [name for label, name in enumerate(classes) if label not in labels]
    if every and empty:
        raise ValueError(f"{folder / empty[0]} contains no image ({', '.join(SUFFIXES)})")
    if not samples:
        raise ValueError(f"{folder} contains no image ({', '.join(SUFFIXES)}) in a folder of its class")
    return Split([path for _, path in samples], labels)


def _annotated(path: Path, classes: list[str]) -> Split:
    """Read tiny-imagenet-200's list of held-out images: in each line, tabs separate a file name, a class and a box."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or row[1] not in classes:
            raise ValueError(f"{path}, line {number}: expected a file name, a tab and a class of train, got {row}")
    if not rows:
        raise ValueError(f"{path} contains no image names")
    return Split(
        [path.parent / "images" / row[0] for row in rows],
        torch.tensor([classes.index(row[1]) for row in rows], device="cpu"),
    )


def _fingerprint(folder: Path, splits: dict[str, Split], classes: list[str]) -> str:
    """A hash of the names, sizes, modification times and labels of the files, and of the names of the classes."""
    content = text_hash(json.dumps(classes))
    for part, split in splits.items():
        for path, label in zip(split.files, split.labels.tolist(), strict=True):
            facts, name = path.stat(), path.relative_to(folder).as_posix()
            content.update(json.dumps([part, name, facts.st_size, facts.st_mtime_ns, label]).encode())
    return content.hexdigest()


# ---- images that cannot be decoded


def _broken(folder: Path, root: Path, splits: dict[str, Split], workers: int) -> dict[str, str]:
    """The errors of the images that cannot be decoded, by path. They are found once, and kept in ``broken.json``."""
    place, known, errors = root / "broken.json", dict[str, Any](), dict[str, str]()
    files = [path for split in splits.values() for path in split.files]
    source = text_hash(json.dumps([[str(path), path.stat().st_mtime_ns] for path in files])).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(place.read_text())
    if known.get("source") == source:
        return dict(known["broken"])
    images = _decoded(files, None, resize=False, workers=workers)
    for path, image in zip(files, _bar(images, len(files), "check images"), strict=True):
        if isinstance(image, str):
            errors[str(path)] = image
    root.mkdir(parents=True, exist_ok=True)
    write_text(place, json.dumps({"source": source, "broken": errors}))
    return errors


def _without(splits: dict[str, Split], broken: dict[str, str], classes: list[str]) -> dict[str, Split]:
    """Leave out images, with a warning that names them. Raise a ValueError if a class of ``train`` would be empty."""
    if not broken:
        return splits
    total = sum(len(split.files) for split in splits.values())
    warnings.warn(f"{len(broken)} of {total} images are left out: {_some(broken.values())}", stacklevel=4)
    kept = {}
    for part, split in splits.items():
        ids = [number for number, path in enumerate(split.files) if str(path) not in broken]
        kept[part] = Split([split.files[number] for number in ids], split.labels[ids])
    empty = [name for label, name in enumerate(classes) if label not in kept["train"].labels]
    if empty or not kept["test"].files:
        what = f"the class {empty[0]} of train" if empty else "the held-out images"
        raise ValueError(f"no image of {what} can be decoded: replace them. The errors are: {_some(broken.values())}")
    return kept


def _some(texts: Iterable[str]) -> str:
    """The first texts."""
    first = list(islice(texts, NAMED + 1))
    return "; ".join(first[:NAMED]) + ("; ..." if len(first) > NAMED else "")


# ---- the cache: x_train-<hash>.npy and x_test-<hash>.npy, with the hash of `_fingerprint`, and set.json, written last


def _cached(
    place: Path, source: str, splits: dict[str, Split], size: tuple[int, int], *, resize: bool, workers: int
) -> dict[str, StreamedImages]:
    """Open the decoded images of exactly these files. If they are missing, decode them first."""
    paths = {part: place / f"x_{part}-{source[:16]}.npy" for part in splits}
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / ".lock").acquire()
    except OSError as error:
        raise OSError(f"decoded images cannot be kept in {place} ({error}): give another folder as cache") from error
    # The process that has the lock writes the cache, and the others wait for it.
    with lock:
        with contextlib.suppress(OSError, ValueError, KeyError):
            digests = json.loads((place / "set.json").read_text())[source]
            images = {part: StreamedImages(path, digests[part]) for part, path in paths.items()}
            if all(len(images[part]) == len(split.files) for part, split in splits.items()):
                return images
        # Remove the arrays of an earlier cache, and the temporary files of killed processes.
        for old in [place / "set.json", *place.glob("x_*.npy"), *place.glob(".x_*.npy")]:
            old.unlink(missing_ok=True)
        failed = dict[str, str]()
        for part, split in splits.items():
            with atomic(paths[part]) as temporary:
                title = f"decode {part} images"
                failed |= decode(split.files, size, resize=resize, out=temporary, workers=workers, title=title)
        if failed:
            for path in paths.values():
                path.unlink()
            total = sum(len(split.files) for split in splits.values())
            raise ValueError(
                f"{len(failed)} of {total} images cannot be decoded: replace or remove them, or leave them out by "
                f"broken='skip' (--broken skip). The errors are: {_some(failed.values())}"
            )
        made = {part: StreamedImages(path, _digest(path)) for part, path in paths.items()}
        write_text(place / "set.json", json.dumps({source: {part: one.digest for part, one in made.items()}}))
        return made


def _digest(path: Path) -> str:
    array = np.load(path, mmap_mode="r")
    content = content_hash(torch.uint8, array.shape)
    content.update(array.data)
    return content.hexdigest()


# ---- decoding


def first_size(files: Sequence[Path]) -> tuple[int, int]:
    """The height and width of the first image that can be decoded. Raises a ValueError if there is none."""
    for path in files:
        image = _image(path, None)
        if not isinstance(image, str):
            return image.shape[1], image.shape[2]
    raise ValueError(f"none of the {len(files)} training images can be decoded, the first is {files[0]}")


def decode(
    files: Sequence[Path], size: tuple[int, int], *, resize: bool, out: Path, workers: int, title: str
) -> dict[str, str]:
    """Decode images into an ``.npy`` file, uint8 ``[N, 3, H, W]``. Only a part of the images is in memory at a time."""
    failed: dict[str, str] = {}
    # The images are written one after another: a full disk ends a write with an OSError, but a memory map with SIGBUS.
    with out.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), 3, *size)}
        np.lib.format.write_array_header_1_0(file, header)
        images = _decoded(files, size, resize=resize, workers=workers)
        for path, image in zip(files, _bar(images, len(files), title), strict=True):
            if isinstance(image, str):
                failed[str(path)] = image
            elif not failed:
                file.write(image.tobytes())
    return failed


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
    """Decode an image file, with the pixels that `purify_fast.data.load_dataset` reads from an image folder.

    Args:
        path: a JPEG, PNG or another file of an image. Transparency and the orientation in the metadata of a photo are
            ignored.
        size: height and width. The image is resized until it just covers this size, and its center is cropped. None
            keeps the size of the image.

    Returns:
        The image, RGB, uint8 ``[3, H, W]``.

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
