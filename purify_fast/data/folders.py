"""Read image folders. Images are decoded once, into a cache of uint8 arrays."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from .._files import atomic
from .._settings import text_hash
from .images import same_name

CACHE = ".purify_fast"
#: The endings of image files: those of torchvision, and those of phones and browsers that this Pillow opens.
_OPENED = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
SUFFIXES = (*IMG_EXTENSIONS, *sorted(_OPENED & {".jfif", ".jpe", ".avif", ".heic", ".heif"}))
#: The endings of files that stand beside images, and are no images.
BESIDE = (".txt", ".xml", ".json", ".csv", ".md", ".db", ".ini")
#: The file of tiny-imagenet-200 that names the classes of the images in val/.
ANNOTATIONS = "val_annotations.txt"
#: Modes of Pillow with 8 bits or less per channel.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
#: Number of images that are decoded before they are written to the cache.
CHUNK = 64
FORM = (
    "train/<class>/*.jpg (or .png, .webp and others), and the held-out images: test/ or val/ in the same form, or "
    "val/images and val/val_annotations.txt as in tiny-imagenet-200"
)


#: The paths of N images, and their labels, int64 ``[N]``.
Split = tuple[list[Path], Tensor]


def read_folder(
    folder: Path, image_size: tuple[int, int] | None, train: bool, cache: str | Path | None
) -> tuple[dict[str, Tensor], list[str], str]:
    """Read the arrays of a data set from an image folder, the names of the classes, and that of the held-out folder."""
    # Folders of one name in different places have different caches.
    whole = folder.resolve()
    named = f"{whole.name}-{text_hash(str(whole)).hexdigest()[:8]}"
    root = folder / CACHE if cache is None else Path(cache) / named
    held_out = _held_out(folder)
    splits, classes = _listed(folder, held_out, train)
    place = root / ("native" if image_size is None else f"{image_size[0]}x{image_size[1]}")
    files, _ = next(iter(splits.values()))
    height, width = read_image(files[0]).shape[1:] if image_size is None else image_size
    arrays = {"x_train": torch.empty((0, 3, height, width), dtype=torch.uint8), "y_train": torch.empty(0).long()}
    for part, (files, labels) in splits.items():
        arrays[f"x_{part}"] = _decoded(place, part, files, (height, width), resize=image_size is not None)
        arrays[f"y_{part}"] = labels
    return arrays, classes, held_out.name


# ---- the files of an image folder


def is_hidden(path: str | Path, folder: Path) -> bool:
    """Return True if a name below ``folder`` in a path begins with a dot, or is that of Synology's small copies."""
    return any(name.startswith((".", "@eaDir")) for name in Path(path).relative_to(folder).parts)


def classes_in(folder: Path) -> list[str]:
    """The names of the classes of a folder, in the order of their labels."""
    return ordered({same_name(path.name) for path in _class_folders(folder)})


def _class_folders(folder: Path) -> list[Path]:
    # torchvision's find_classes would treat a hidden folder, such as the folder of an editor, as a class.
    return [path for path in folder.iterdir() if path.is_dir() and not is_hidden(path, folder)]


def ordered(names: Iterable[str]) -> list[str]:
    """Sort the names of classes. Names that are all whole numbers are sorted by these, so "10" is after "9"."""
    names = sorted(names)
    if not all(name.isdecimal() for name in names) or (numbers := sorted(names, key=int)) == names:
        return names
    text = "the classes are named by numbers and are sorted by these numbers, unlike in torchvision, which sorts texts"
    moved = next(name for name, other in zip(names, numbers, strict=True) if name != other)
    warnings.warn(f"{text}: the class {moved} has the label {numbers.index(moved)}", stacklevel=2)
    return numbers


def _held_out(folder: Path) -> Path:
    """The folder of the held-out images: test/ if it has a folder for each class, or else val/."""
    present = [folder / name for name in ("test", "val") if (folder / name).is_dir()]
    if not present:
        lacks = "test/ and val/"
        if not (folder / "train").is_dir() and len(own := classes_in(folder)) > 1:
            lacks += f" (move its folders {', '.join(own[:3])} ... into train/, and some images of each into test/)"
        raise FileNotFoundError(f"{folder} is not an image folder: it lacks {lacks}. It must contain {FORM}")
    # The images in test/ of tiny-imagenet-200, and of many competitions, have no labels, or a folder "unknown".
    known = classes_in(folder / "train") if (folder / "train").is_dir() else None
    labelled = [part for part in present if (own := classes_in(part)) and (known is None or {*own} <= {*known})]
    return folder / "val" if (folder / "val" / ANNOTATIONS).is_file() else (labelled or present)[0]


def _listed(folder: Path, held_out: Path, train: bool) -> tuple[dict[str, Split], list[str]]:
    """The splits and the names of the classes. Without ``train``, only the names of the folders in train/ are read."""
    trained, annotations = folder / "train", held_out / ANNOTATIONS
    if train and not trained.is_dir():
        raise FileNotFoundError(f"{folder} is not an image folder: it lacks train/. It must contain {FORM}")
    # In each line of this file of tiny-imagenet-200, tabs separate a file name, a class and a box.
    rows = [line.split("\t") for line in annotations.read_text().splitlines()] if annotations.is_file() else []
    shown = ordered({row[1] for row in rows}) if rows else classes_in(held_out)
    classes = classes_in(trained) if trained.is_dir() else shown
    if len(classes) < 2:
        raise ValueError(f"{trained} must contain a folder for each of at least 2 classes, got {classes}")
    if unknown := set(shown) - set(classes):
        raise ValueError(f"{held_out} has the classes {', '.join(sorted(unknown))}, which the folder train/ lacks")
    if rows:
        labels = torch.tensor([classes.index(row[1]) for row in rows], device="cpu")
        test = [held_out / "images" / row[0] for row in rows], labels
    else:
        test = _by_class(held_out, classes)
    if not test[0]:
        raise ValueError(f"{held_out} contains no image ({', '.join(SUFFIXES)})")
    if not train:
        return {"test": test}, classes
    files, labels = _by_class(trained, classes)
    if empty := [name for label, name in enumerate(classes) if label not in labels]:
        raise ValueError(f"{trained} contains no image of {', '.join(empty)}: remove the folder, or add images")
    return {"train": (files, labels), "test": test}, classes


def _by_class(folder: Path, classes: Sequence[str]) -> Split:
    """The images in the folders of classes, sorted by label and path. A warning tells of files that are left out."""
    listed, left_out = list[tuple[int, Path]](), Counter[str]()
    for place in _class_folders(folder):
        label = classes.index(same_name(place.name))
        # Other than Path.rglob, os.walk follows links to folders, which share images between data sets.
        walked = (Path(top, name) for top, _, names in os.walk(place, followlinks=True) for name in names)
        for path in (path for path in walked if not is_hidden(path, folder)):
            if path.suffix.lower() in SUFFIXES:
                listed.append((label, path))
            elif path.suffix.lower() not in BESIDE:
                left_out[path.suffix or path.name] += 1
    if left_out:
        endings = ", ".join(f"{count} {ending}" for ending, count in sorted(left_out.items()))
        warnings.warn(
            f"files in {folder} are left out, because this Pillow opens none like them: {endings}", stacklevel=2
        )
    shown = sorted(listed)
    return [path for _, path in shown], torch.tensor([label for label, _ in shown], dtype=torch.int64, device="cpu")


def _source(files: Sequence[Path]) -> str:
    """A hash of the names, sizes and modification times of files."""
    content, shared = text_hash(), len(os.path.commonpath(files))
    for path in files:
        facts = path.stat()
        content.update(json.dumps([str(path)[shared:], facts.st_size, facts.st_mtime_ns]).encode())
    return content.hexdigest()


# ---- decoding


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Decode an image file to RGB, uint8 ``[3, H, W]``, as `purify_fast.data.load_dataset` does for an image folder.

    Args:
        path: a JPEG, PNG or another file of an image. Transparency and the orientation in the metadata are ignored.
        size: height and width. The image is resized until it just covers this size, and its center is cropped. None
            keeps the size of the image.

    Raises:
        ValueError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            if file.mode not in MODES:
                raise ValueError(f"its mode is {file.mode}, not one of {', '.join(MODES)}")
            image = file.convert("RGB")
    # A damaged file may raise any error.
    except Exception as error:
        raise ValueError(f"the image cannot be decoded: {path}: {error}") from error
    if size is not None:
        # torchvision's Resize with the length of the shorter side would not always cover a target that is not square.
        (height, width), sides = size, (image.height, image.width)
        wide = height * sides[1] < width * sides[0]
        covering = [sides[0] * width // sides[1], width] if wide else [height, sides[1] * height // sides[0]]
        image = functional.center_crop(functional.resize(image, covering), list(size))
    return functional.pil_to_tensor(image).contiguous()


def _decoded(place: Path, part: str, files: Sequence[Path], size: tuple[int, int], *, resize: bool) -> Tensor:
    """Open the decoded images of a part of the data set. Decode them if the folder ``place`` does not have them."""
    whole = place / f"x_{part}-{_source(files)[:16]}.npy"
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        advice = "give another folder for the decoded images as cache, on the command line --cache FOLDER"
        raise OSError(error.errno, f"{error.strerror}: {advice}", str(place)) from error
    # The process that has the lock writes the file, and the others wait for it.
    with FileLock(place / ".lock"):
        with contextlib.suppress(OSError, EOFError, ValueError):
            return _mapped(whole)
        # Remove the arrays of an earlier cache, and the temporary files of killed processes.
        for old in place.glob(f"*x_{part}-*.npy"):
            old.unlink()
        with atomic(whole) as temporary:
            write_images(files, size, temporary, resize=resize)
        return _mapped(whole)


def _mapped(path: Path) -> Tensor:
    """Map an ``.npy`` file into memory. Its parts are read when they are used; writes do not change the file."""
    images = np.load(path, mmap_mode="c")
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"{path} must contain a uint8 array [N, C, H, W]")
    return torch.from_numpy(images)


def write_images(files: Sequence[Path], size: tuple[int, int], out: Path, *, resize: bool) -> None:
    """Decode images into an ``.npy`` file, uint8 ``[N, 3, H, W]``."""
    shape = (len(files), 3, *size)

    def decode(path: Path) -> memoryview:
        image = read_image(path, size if resize else None)
        if image.shape != shape[1:]:
            advice = "give image_size=(H, W), on the command line --size H W"
            got, wanted = (" x ".join(map(str, sides[1:])) for sides in (image.shape, shape[1:]))
            raise ValueError(f"{path} has {got} pixels, but others have {wanted}: {advice}")
        return image.numpy().data

    # Write from front to back: a full disk ends a write with an OSError, but a memory map with SIGBUS.
    with out.open("wb") as file, ThreadPoolExecutor() as pool:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with tqdm(desc="decode images", total=len(files), unit=" images") as bar:
            for first in range(0, len(files), CHUNK):
                for pixels in pool.map(decode, files[first : first + CHUNK]):
                    file.write(pixels)
                    bar.update()
