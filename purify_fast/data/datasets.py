"""Load data sets by name or path as uint8 images ``[N, C, H, W]``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from .._files import atomic
from .._settings import text_hash
from .images import same_name

#: Torchvision's classes that read the official files of data sets, by name.
READERS: dict[str, Any] = {
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "svhn": SVHN,
}
#: Names of the data sets that can be read from official files or from ``<root>/<name>.npz``.
NAMES = (*READERS, "tiny_imagenet")
DIGITS_TEST = 500
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True, repr=False)
class DataSet:
    """Training images and held-out images, with their labels.

    The images of an image folder are in a file that is mapped into memory, so they need not fit into memory.

    Args:
        x_train: training images, uint8 ``[N, C, H, W]``, from 0 (black) to 255 (white).
        y_train: labels of the training images, int64 ``[N]``, from 0 to num_classes - 1.
        x_test: held-out images, in the same form.
        y_test: labels of the held-out images.
        name: name of the data set, for reports.
        num_classes: number of classes, at least 2.
        classes: names of the classes, in the order of their labels; None if they are not known.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    name: str
    num_classes: int
    classes: tuple[str, ...] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        c, h, w = self.x_train.shape[1:]
        return c, h, w

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.image_shape))
        images = f"{len(self.x_train)} training and {len(self.x_test)} held-out images"
        return f"DataSet({self.name!r}, {images} of {size}, {self.num_classes} classes, on {self.y_train.device})"

    def to(self, device: torch.device | str) -> DataSet:
        """Move the data to another device."""
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in ARRAYS})


def load_dataset(
    name_or_path: str | Path,
    root: str | Path | None = None,
    num_classes: int | None = None,
    *,
    train: bool = True,
    download: bool = False,
    image_size: tuple[int, int] | None = None,
    cache: str | Path | None = None,
) -> DataSet:
    """Load a data set.

    Args:
        name_or_path: a name, the path of an ``.npz`` file, or the path of an image folder.
            The names are ``digits``, ``mnist``, ``fashion_mnist``, ``cifar10``, ``cifar100``, ``svhn`` and
            ``tiny_imagenet``. All except ``digits`` are read from ``<root>/<name>.npz`` if that file exists, or else
            from the official files under root, in torchvision's folders or in ``tiny-imagenet-200``.
            An ``.npz`` file has the arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test``. Images are uint8
            ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` with C = 1 or 3. Labels are integers ``[N]`` or
            ``[N, 1]``, and every number from 0 to the largest label must occur, unless ``num_classes`` is given. An
            array of texts ``classes`` may name the classes.
            An image folder has ``train/<class>/*.jpg|png``, and ``test/`` or ``val/`` in the same form, or it is
            tiny-imagenet-200. The held-out images are those of ``test/`` if it has labels, that is, a folder for each
            class. The name of the data set then ends in ``/test``, and else in ``/val``. The classes are the folder
            names, sorted as texts, or as numbers if all of them are numbers. Images are read as RGB. Files and
            folders whose names begin with a dot do not count.
        root: folder of the data sets; None means the current folder. A relative path is looked up as it is and in root,
            where the ending ``.npz`` may be left out (``load_dataset("set", "data")``).
        num_classes: number of classes. Give it if some labels do not occur in the data set. None means the largest
            label plus 1.
        train: whether to read the training images. If False, ``x_train`` and ``y_train`` are empty, and their files are
            not needed. The folders in ``train`` still number the classes; without ``train``, those of the held-out
            images do.
        download: whether torchvision may download the official files to root if they are missing.
        image_size: height and width. An image is resized until it just covers this size, and its center is cropped.
            None keeps the sizes; all images of a folder must then have the same size.
        cache: folder for the decoded images of an image folder; None: ``.purify_fast`` in the image folder. They are
            decoded before the first use. An error names an image that cannot be decoded.

    Returns:
        A `DataSet` on the CPU.

    Raises:
        FileNotFoundError: there is no such data set. The message says how to get it.
        OSError: the cache cannot be written.
        ValueError: an argument does not fit the data set, or the content of the files is not allowed.
    """
    name = str(name_or_path)
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ValueError(f"image_size must be (H, W), both at least 1, got {image_size}")
    source: Path | dict[str, np.ndarray]
    if name in NAMES:
        source = find_official(name, Path("." if root is None else root), download, train)
    else:
        source = _digits() if name == "digits" else _find(Path(name_or_path), None if root is None else Path(root))
    if isinstance(source, Path) and source.is_dir():
        tensors, names, held_out = read_folder(source, image_size, train, cache)
        title = name if name in NAMES else f"{source.resolve().name}/{held_out}"
        classes = _number_of_classes(len(names), num_classes)
        return DataSet(**tensors, name=title, num_classes=classes, classes=tuple(names))
    arrays = _read_npz(source, train) if isinstance(source, Path) else source
    tensors, classes = _checked(arrays, num_classes)
    if not train:
        tensors |= {"x_train": tensors["x_test"][:0], "y_train": tensors["y_test"][:0]}
    texts = arrays.get("classes", np.zeros(1))
    named = tuple(texts.tolist()) if texts.ndim == 1 and texts.dtype.kind == "U" else None
    title = source.stem if isinstance(source, Path) else name
    loaded = DataSet(**tensors, name=title, num_classes=classes, classes=named)
    if image_size is None or tuple(image_size) == loaded.image_shape[1:]:
        return loaded
    x_train, x_test = (_resized(images, image_size) for images in (loaded.x_train, loaded.x_test))
    return dataclasses.replace(loaded, x_train=x_train, x_test=x_test)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images bilinearly and crop their centers, as `load_dataset` describes."""
    sides = list(zip(size, images.shape[2:], strict=True))
    factor = max(target / side for target, side in sides)
    covering = [max(round(factor * side), target) for target, side in sides]
    resized = images.new_empty((*images.shape[:2], *size))
    # Resize some images at a time, because the intermediate results need several times the memory of the images.
    for small, out in zip(images.split(256), resized.split(256), strict=True):
        out.copy_(functional.center_crop(functional.resize(small, covering, antialias=True), list(size)))
    return resized


def small_digits() -> tuple[Tensor, Tensor]:
    """Load the digits as published, in the published order. The file digits.txt names their source."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        return torch.from_numpy(file["images"])[:, None], torch.from_numpy(file["labels"]).long()


def _digits() -> dict[str, np.ndarray]:
    """Enlarge the digits from 8 x 8 to 16 x 16 pixels, bilinearly, and split them by a fixed permutation."""
    small, y = small_digits()
    # In float64 only the last step rounds, so the bits are the same on every machine.
    images = F.interpolate(small.double() / 16, size=(16, 16), mode="bilinear", align_corners=False)
    x = (images * 255).round().to(torch.uint8).numpy()
    # NumPy promises that the random numbers of RandomState never change.
    order = np.random.RandomState(0).permutation(len(y))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    labels, classes = y.numpy(), np.array(list("0123456789"))
    arrays = {"x_train": x[train], "y_train": labels[train], "x_test": x[test], "y_test": labels[test]}
    return arrays | {"classes": classes}


def _find(path: Path, root: Path | None) -> Path:
    candidates = [path] if root is None else [path, root / path, root / f"{path}.npz"]
    existing = [path for exists in (Path.is_file, Path.is_dir) for path in candidates if exists(path)]
    if existing:
        return existing[0]
    looked = ", ".join(str(candidate.absolute()) for candidate in candidates)
    raise FileNotFoundError(
        f"no data set {str(path)!r}: looked for {looked}. Give 'digits', one of {', '.join(NAMES)}, an .npz file "
        f"(numpy.savez) with the arrays x_train, x_test (uint8 images) and y_train, y_test (integer labels), or an "
        f"image folder with train/<class>/*.jpg|png and test/ or val/ in the same form"
    )


# ---- arrays are checked, and converted to uint8 images [N, C, H, W] and int64 labels


def _read_npz(path: Path, train: bool) -> dict[str, np.ndarray]:
    """Read the `ARRAYS` of an ``.npz`` file and ``classes``, without ``x_train`` if ``train`` is False."""
    needed = ARRAYS if train else ARRAYS[2:]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays, there = {name: file[name] for name in (*needed, "y_train", "classes") if name in file}, file.files
    # A file that is damaged, or that is none of `numpy.savez`, may raise any error.
    except Exception as error:
        raise ValueError(f"{path} is damaged, or not a file that numpy.savez wrote from arrays: {error}") from error
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it must have {', '.join(needed)}, got {', '.join(there)}")
    return arrays


def _checked(arrays: dict[str, np.ndarray], num_classes: int | None) -> tuple[dict[str, Tensor], int]:
    """Convert images to uint8 ``[N, C, H, W]`` and labels to int64 ``[N]``, and count the classes."""
    checked = {name: (_images if name[0] == "x" else _labels)(name, arrays[name]) for name in ARRAYS if name in arrays}
    train, test = checked.get("x_train", checked["x_test"]).shape[1:], checked["x_test"].shape[1:]
    if train != test:
        raise ValueError(f"x_test must have images of the shape {list(train)}, like x_train, got {list(test)}")
    for part in ("train", "test"):
        images, labels = checked.get(f"x_{part}"), checked.get(f"y_{part}")
        if images is not None and labels is not None and len(images) != len(labels):
            raise ValueError(f"y_{part} must have a label for each of the {len(images)} images, got {len(labels)}")
    present = np.unique(np.concatenate([array for name, array in checked.items() if name[0] == "y"]))
    classes = 1 + int(present[-1])
    if num_classes is None and (len(present) < classes or classes < 2):
        text = f"every label from 0 to the largest, at least 1, must occur, got {len(present)} labels up to "
        raise ValueError(f"{text}{classes - 1}: pass num_classes if this is intended")
    tensors = {name: torch.from_numpy(array) for name, array in checked.items()}
    return tensors, _number_of_classes(classes, num_classes)


def _number_of_classes(present: int, count: int | None) -> int:
    if count is not None and count < present:
        raise ValueError(f"num_classes is {count}, but the labels go up to {present - 1}: pass at least {present}")
    return present if count is None else count


def _images(name: str, array: np.ndarray) -> np.ndarray:
    """Convert images to contiguous uint8 ``[N, C, H, W]``."""
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or 0 in array.shape:
        needs = f"{name} must be uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with at least one image"
        advice = "for images in [0, 1], save (255 * x).round().astype('uint8')"
        raise ValueError(f"{needs}, got {array.dtype} {list(array.shape)}: {advice}")
    if array.ndim == 3:
        return np.ascontiguousarray(array[:, None])
    first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
    if first == last:
        which = "both" if first else "neither"
        text = f"{name} must have 1 or 3 channels, in its second or in its last dimension, got {which} in the shape "
        raise ValueError(f"{text}{list(array.shape)}")
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2) if last else array)


def _labels(name: str, array: np.ndarray) -> np.ndarray:
    column = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if column.ndim != 1 or column.dtype.kind not in "iu" or len(column) == 0:
        raise ValueError(f"{name} must be integers [N] or [N, 1], N at least 1, got {array.dtype} {list(array.shape)}")
    # A larger label would overflow int64 or the count of classes.
    if column.min() < 0 or column.max() >= 2**31:
        raise ValueError(f"{name} must have labels from 0 to 2^31 - 1, got {column.min()} to {column.max()}")
    return column.astype(np.int64)


# -- read and download the official files of data sets with torchvision ------------------------------------------------

TINY = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def find_official(name: str, root: Path, download: bool, train: bool) -> Path | dict[str, np.ndarray]:
    """Find a well-known data set: the path of its ``.npz`` or image folder, or its arrays."""
    npz = root / f"{name}.npz"
    if npz.is_file():
        return npz
    if download:
        root.mkdir(parents=True, exist_ok=True)
    try:
        # With this lock only a single process downloads, and the other processes then read the files.
        with FileLock(root / f".{name}.lock") if download else contextlib.nullcontext():
            if name in READERS:
                return _arrays(name, root, download, ("train", "test") if train else ("test",))
            folder = root / "tiny-imagenet-200"
            if not folder.is_dir():
                raise FileNotFoundError(f"there is no {folder.name}, which torchvision cannot download: {TINY}")
            return folder
    # A damaged file may raise any error.
    except Exception as error:
        usual = "give download=True (--download), or remove damaged files"
        advice = usual if name in READERS else "download it yourself"
        looked = f"{npz.absolute()} (x_train, y_train, x_test, y_test), and for the official files in {root.absolute()}"
        how = f"as torchvision lays them out: {str(error) or repr(error)}"
        raise FileNotFoundError(f"no data set {name!r}: {advice}. Looked for {looked} {how}") from error


def _arrays(name: str, root: Path, download: bool, parts: tuple[str, ...]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for part in parts:
        # torchvision's class for SVHN has other names for the parts and the labels.
        split = {"split": part} if name == "svhn" else {"train": part == "train"}
        loaded = READERS[name](root, download=download, **split)
        arrays |= {f"x_{part}": np.asarray(loaded.data)}
        arrays |= {f"y_{part}": np.asarray(loaded.labels if name == "svhn" else loaded.targets)}
        # torchvision calls MNIST's classes "0 - zero" and so on, and has no names of SVHN's, which are the digits.
        names = getattr(loaded, "classes", map(str, range(10)))
        arrays["classes"] = np.array([text.partition(" - ")[0] for text in names])
    return arrays


# -- image folders, whose images are decoded once, into a cache of uint8 arrays ----------------------------------------

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
    resolved = folder.resolve()
    named = f"{resolved.name}-{text_hash(str(resolved)).hexdigest()[:8]}"
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
    names = classes_in(folder / "train") if (folder / "train").is_dir() else None
    labelled = [part for part in present if (own := classes_in(part)) and (names is None or {*own} <= {*names})]
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
        text = f"files in {folder} are left out, because this Pillow opens none like them: {endings}"
        warnings.warn(text, stacklevel=2)
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
    cached = place / f"x_{part}-{_source(files)[:16]}.npy"
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        advice = "give another folder for the decoded images as cache, on the command line --cache FOLDER"
        raise OSError(error.errno, f"{error.strerror}: {advice}", str(place)) from error
    # The process that has the lock writes the file, and the others wait for it.
    with FileLock(place / ".lock"):
        with contextlib.suppress(OSError, EOFError, ValueError):
            return _mapped(cached)
        # Remove the arrays of an earlier cache, and the temporary files of killed processes.
        for old in place.glob(f"*x_{part}-*.npy"):
            old.unlink()
        with atomic(cached) as temporary:
            write_images(files, size, temporary, resize=resize)
        return _mapped(cached)


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
            got, other = (" x ".join(map(str, sides[1:])) for sides in (image.shape, shape[1:]))
            raise ValueError(f"{path} has {got} pixels, but others have {other}: {advice}")
        return image.numpy().data

    # Write from front to back: a full disk ends a write with an OSError, but a memory map with SIGBUS.
    with out.open("wb") as file, ThreadPoolExecutor() as pool:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with tqdm(desc="decode images", total=len(files), unit=" images") as bar:
            for first in range(0, len(files), CHUNK):
                for pixels in pool.map(decode, files[first : first + CHUNK]):
                    file.write(pixels)
                    bar.update()
