"""Image folders and tar shards: decoded once into a cache of uint8 arrays, or whenever an image is read."""

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
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import BaseFileLock, FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
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
#: Version of the cache; a cache of another version is decoded anew.
FORMAT = 1
#: How many files or classes a message names.
NAMED = 10
#: Pillow's modes with 8 bits a channel.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
#: How many images a process decodes at a time.
CHUNK = 32
FORM = (
    "train/<class>/*.jpg|png and val/ or test/ in the same form, or tiny-imagenet-200's val/images and "
    f"val/val_annotations.txt, or {FORM_OF_SHARDS}"
)


class Split(NamedTuple):
    """N images, files or members of shards, and their labels, int64 ``[N]``."""

    files: Sequence[Path | Member]
    labels: Tensor


#: By split, the decoded images, and what is wrong with those left out, by their numbers among its files.
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
    """Images of an image folder, from its cache, which is written first where it is missing or the files changed.

    The arguments are those of `purify_fast.data.load_dataset`. The classes are the folders in ``train``, sorted; the
    held-out images are ``val``'s, else ``test``'s.

    Returns:
        Images (RGB ``[N, 3, H, W]``) and labels (int64 ``[N]``) by ``train`` and ``test``, and the number of classes.

    Raises:
        FileNotFoundError: the folder lacks a part of the form.
        ValueError: a class without images or not in ``train``, labels that do not fit, images that cannot be decoded
            or, without ``image_size``, that differ in size.
        OSError: the cache cannot be written, or its disk has too little space.
    """
    root = folder / CACHE if cache is None else cache / folder.resolve().name
    splits, classes = _listed(folder, root)
    for split in splits.values():
        _check_links(folder, [_file(image) for image in split.files], follow_links)
    source = _fingerprint(folder, splits, classes)
    # Linux tells the CPUs that this process may use
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    count = cpus if workers is None else workers
    if decode_once:
        cached = _decoded_once(root, source, splits, image_size, count)
    else:
        size = first_size(splits["train"].files) if image_size is None else image_size
        how: dict[str, Any] = {"resize": image_size is not None, "workers": count}
        cached = {
            part: (EncodedImages(split.files, size, f"{part} of {source}", **how), {}) for part, split in splits.items()
        }
    memory = available_memory() // 2
    x: dict[str, Tensor | StreamedImages] = {}
    y: dict[str, Tensor] = {}
    # the held-out images first, since evaluation wants them whole
    for part in ("test", "train"):
        images, left_out = cached[part]
        if left_out:
            text = f"{len(left_out)} of {len(splits[part].files)} images of {folder} cannot be decoded"
            names = "; ".join(list(left_out.values())[:NAMED]) + ("; ..." if len(left_out) > NAMED else "")
            if on_bad_image == "refuse" or not len(images):
                advice = "replace or remove them, or skip them with on_bad_image='skip' (--on-bad-image skip)"
                raise ValueError(f"{text}, {advice}: {names}")
            logger.warning("%s and are left out: %s", text, names)
        needed = images.shape.numel()
        streamed = stream or needed > memory
        memory -= 0 if streamed else needed
        x[part] = images if streamed else images[:]
        y[part] = torch.from_numpy(np.delete(splits[part].labels.numpy(), list(left_out)))
    return x, y, len(classes)


def _decoded_once(
    root: Path, source: str, splits: dict[str, Split], image_size: tuple[int, int] | None, workers: int
) -> Cached:
    """The decoded images, from the cache in a folder, which is written first where it is missing."""
    place = root / ("native" if image_size is None else f"{image_size[0]}x{image_size[1]}")
    cached = _opened(place, source, splits)
    if cached is None:
        with _locked(place):
            # another process may have written it meanwhile
            cached = _opened(place, source, splits) or _write(place, source, splits, image_size, workers=workers)
    return cached


# ---- what there is


def _file(image: Path | Member) -> Path:
    return image.shard if isinstance(image, Member) else image


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _classes_in(folder: Path) -> list[str]:
    # torchvision's find_classes would take a hidden folder, such as an editor's, for a class
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _listed(folder: Path, index: Path) -> tuple[dict[str, Split], list[str]]:
    """The two splits, and the names of the classes; ``index`` is a folder that keeps where the images of shards are."""
    held_out = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if held_out is None or not (folder / "train").is_dir():
        lacks = "train/" if held_out is not None else "val/ and test/"
        raise FileNotFoundError(f"{folder} is not an image folder: it lacks {lacks}; it must hold {FORM}")
    if shards_of(folder / "train"):
        if not shards_of(held_out):
            raise FileNotFoundError(f"{held_out} has no shards, and train has: there must be {FORM_OF_SHARDS}")
        splits = {}
        for part, place in {"train": folder / "train", "test": held_out}.items():
            images, labels = members(shards_of(place), SUFFIXES, index / f"shards_{part}.npz")
            splits[part] = Split(images, torch.tensor(labels, dtype=torch.int64))
        highest = int(splits["train"].labels.max())
        if int(splits["test"].labels.max()) > highest:
            raise ValueError(f"{held_out} has labels above {highest}, the largest of train")
        return splits, [str(label) for label in range(highest + 1)]
    classes = _classes_in(folder / "train")
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'} must hold a folder for each of at least 2 classes, got {classes}")
    annotations = held_out / "val_annotations.txt"
    test = _annotated(annotations, classes) if annotations.is_file() else _by_class(held_out, classes, every=False)
    return {"train": _by_class(folder / "train", classes, every=True), "test": test}, classes


def _check_links(folder: Path, files: list[Path], follow: bool) -> None:
    """ValueError for a link that leads in a circle, and for a link out of the folder unless links may lead out."""
    root = folder.resolve()
    # resolve each folder once, since there may be a million files
    real = {parent: parent.resolve() for parent in {path.parent for path in files}}
    links = {place for parent in real for place in (parent, *parent.parents) if place != folder and place.is_symlink()}
    for link in sorted(links):
        if link.is_relative_to(folder) and link.parent.resolve().is_relative_to(link.resolve()):
            raise ValueError(f"{link} links to a folder that contains it: its images would be read again and again")
    if follow:
        return
    for path in files:
        target = path.resolve() if path.is_symlink() else real[path.parent]
        if not target.is_relative_to(root):
            raise ValueError(
                f"{path} leads out of {folder}, to {target}, by a symbolic link: remove it, or allow it with "
                "follow_links=True (--follow-links)"
            )


def _by_class(folder: Path, classes: list[str], every: bool) -> Split:
    unknown = sorted(set(_classes_in(folder)) - set(classes))
    if unknown:
        raise ValueError(f"{folder} holds the classes {', '.join(unknown[:NAMED])}, which train lacks")
    numbered = {name: label for label, name in enumerate(classes)}
    listed = make_dataset(folder, numbered, is_valid_file=_is_image, allow_empty=True)
    # sort by path within a class; torchvision would put a folder's files before those in its subfolders
    samples = sorted((label, Path(path)) for path, label in listed)
    labels = torch.tensor([label for label, _ in samples], dtype=torch.int64)
    empty = [name for label, name in enumerate(classes) if label not in labels]
    if every and empty:
        raise ValueError(f"{folder / empty[0]} holds no image ({', '.join(SUFFIXES)})")
    if not samples:
        raise ValueError(f"{folder} holds no image ({', '.join(SUFFIXES)}) in a folder of its class")
    return Split([path for _, path in samples], labels)


def _annotated(path: Path, classes: list[str]) -> Split:
    """tiny-imagenet-200's held-out images: lines of file name, class and a box, separated by tabs."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or row[1] not in classes:
            raise ValueError(f"{path}, line {number}: expected a file name, a tab and a class of train, got {row}")
    if not rows:
        raise ValueError(f"{path} names no image")
    return Split(
        [path.parent / "images" / row[0] for row in rows], torch.tensor([classes.index(row[1]) for row in rows])
    )


def _fingerprint(folder: Path, splits: dict[str, Split], classes: list[str]) -> str:
    """A hash of the files' names, sizes, times and labels."""
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
    """The cached images of exactly these files; None if there are none."""
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
    """A lock under which one process writes a cache while others wait; it ends with the process."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        return FileLock(place / ".lock").acquire()
    except OSError as error:
        raise OSError(f"decoded images cannot be kept in {place} ({error}): give another folder as cache") from error


def _write(
    place: Path, source: str, splits: dict[str, Split], image_size: tuple[int, int] | None, *, workers: int
) -> Cached:
    (place / "set.json").unlink(missing_ok=True)
    # files for other images, or of a killed process
    for old in [*place.glob("x_*.npy"), *place.glob(".x_*.npy")]:
        old.unlink()
    size = first_size(splits["train"].files) if image_size is None else image_size
    needed = sum(len(split.files) for split in splits.values()) * 3 * size[0] * size[1]
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(f"{place} has {free} bytes free, the decoded images need {needed}: give another folder as cache")
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
    """(H, W) of the first image that can be decoded; ValueError if none can."""
    for path in files:
        image = _image(path, None)
        if not isinstance(image, str):
            return image.shape[1], image.shape[2]
    raise ValueError(f"none of the {len(files)} training images can be decoded; the first: {_image(files[0], None)}")


def decode(
    files: Sequence[Path | Member], size: tuple[int, int], *, resize: bool, out: Path, workers: int, title: str
) -> dict[int, str]:
    """Decode images into one ``.npy`` file, uint8 ``[N, 3, H, W]``; all of it passes through in chunks.

    Args:
        files: the images, in the order they are written in.
        size: (H, W) of every image in the file.
        resize: whether images are resized and cropped to that size; if not, an image of another size is refused.
        out: the file to write.
        workers: processes that decode, 0 for only this process.
        title: text of the progress bar.

    Returns:
        The error of each image that cannot be decoded and is left out, by its number among the files.

    Raises:
        ValueError: an image of another size.
    """
    bar = tqdm(total=len(files), unit="img", desc=title, mininterval=0.1 if sys.stderr.isatty() else 10)
    failed: dict[int, str] = {}
    images = _decoded(files, size if resize else None, workers)
    with bar, out.open("wb") as file:
        _write_header(file, len(files), size)
        for number, (path, image) in enumerate(zip(files, images, strict=True)):
            bar.update()
            if isinstance(image, str):
                failed[number] = image
            elif image.shape[1:] != size:
                got = " x ".join(map(str, image.shape[1:]))
                raise ValueError(f"{path} has {got} pixels, others {size[0]} x {size[1]}: {GIVE_SIZE}")
            else:
                file.write(image.tobytes())
        file.seek(0)
        _write_header(file, len(files) - len(failed), size)
    return failed


def _write_header(file: BinaryIO, count: int, size: tuple[int, int]) -> None:
    # its length does not depend on the count, because numpy leaves room for any count
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, *size)}
    np.lib.format.write_array_header_1_0(file, header)


def _decoded(files: Sequence[Path | Member], size: tuple[int, int] | None, workers: int) -> Iterator[np.ndarray | str]:
    """Every file's image, or its error, in order; a bounded number wait."""
    workers = min(workers, len(files) // CHUNK)
    loader: DataLoader[Path | Member] = DataLoader(
        files,  # type: ignore[arg-type]  # a list is a data set
        CHUNK,
        num_workers=workers,
        collate_fn=functools.partial(_images, size=size),
        # a spawned process would import the caller's script again; these touch only Pillow
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # the loader draws a seed that its processes do not need
        generator=torch.Generator(),
    )
    for images in loader:
        yield from images


def _images(files: Sequence[Path | Member], size: tuple[int, int] | None) -> list[np.ndarray | str]:
    return [_image(path, size) for path in files]


def _image(path: Path | Member, size: tuple[int, int] | None) -> np.ndarray | str:
    """RGB uint8 [3, H, W], or a sentence that names the file and says what is wrong with it.

    Transparency and a camera's note on orientation are ignored.
    """
    try:
        with Image.open(BytesIO(path.read()) if isinstance(path, Member) else path) as file:
            if file.mode not in MODES:
                return f"{path}: its mode is {file.mode}, not one of {', '.join(MODES)}"
            image = file.convert("RGB")
    # a broken file can raise anything
    except Exception as error:
        return f"{path}: {error}"
    if size is not None:
        # torchvision's Resize takes the length of the shorter side: it would not cover a target that is not square
        (height, width), sides = size, (image.height, image.width)
        wide = height * sides[1] < width * sides[0]
        covering = [sides[0] * width // sides[1], width] if wide else [height, sides[1] * height // sides[0]]
        image = functional.center_crop(functional.resize(image, covering), list(size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class EncodedImages(StreamedImages):
    """Images that stay as they are, JPEG or PNG, and are decoded whenever they are read, by several threads.

    Decoding once would take too much room on some disks: ImageNet's 1.28 million training images take 193 GB at 224 x
    224. The pixels are the same.

    Args:
        files: the images, files or members of shards; they must not change while this is used.
        size: (H, W) of what is read.
        digest: stands for the images in `purify_fast._tensors.digest`.
        resize: whether images are resized and cropped to that size; if not, an image of another size is refused.
        workers: threads that decode; 0 for only the caller's.
        device: where the images go that are read.
    """

    def __init__(
        self,
        files: Sequence[Path | Member],
        size: tuple[int, int],
        digest: str,
        *,
        resize: bool,
        workers: int,
        device: torch.device | str = "cpu",
    ):
        self.files, self.size, self.resize, self.workers = files, size, resize, workers
        self.device = torch.empty(0, device=device).device
        self.shape = torch.Size((len(files), 3, *size))
        self.digest = f"{digest} at {size[0]} x {size[1]}"

    def read(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        images = torch.empty((len(ids), *self.shape[1:]), dtype=torch.uint8) if out is None else out
        with contextlib.ExitStack() as stack:
            each = stack.enter_context(ThreadPoolExecutor(self.workers)).map if self.workers > 1 else map
            for row, image in enumerate(each(self._read_one, ids.tolist())):
                images[row] = torch.from_numpy(image)
        return images

    def _read_one(self, number: int) -> np.ndarray:
        image = _image(self.files[number], self.size if self.resize else None)
        if isinstance(image, str):
            raise ValueError(f"an image cannot be decoded: {image}; replace it, or remove it and begin anew")
        if image.shape[1:] != self.size:
            got, wanted = (" x ".join(map(str, size)) for size in (image.shape[1:], self.size))
            raise ValueError(f"{self.files[number]} has {got} pixels, others {wanted}: {GIVE_SIZE}")
        return image
