"""Data sets by name or path, as uint8 NCHW images: digits, ``.npz`` files, official files, image folders."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .folders import read_folder
from .official import NAMES, find_official
from .streaming import StreamedImages

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
DIGITS_TEST = 500


@dataclass(frozen=True)
class DataSet:
    """Images ``[N, C, H, W]`` uint8 (0 black, 255 white) and labels ``[N]`` int64 in 0 .. num_classes - 1.

    Images larger than memory are `StreamedImages`: `purify_fast.training.fit` takes them as they are, for anything
    else a slice of them is a tensor (``x_test[:500]``, ``x_test[:]``).
    """

    x_train: Tensor | StreamedImages
    y_train: Tensor
    x_test: Tensor | StreamedImages
    y_test: Tensor
    name: str
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        c, h, w = self.x_train.shape[1:]
        return c, h, w

    def to(self, device: torch.device | str) -> DataSet:
        """The same data on ``device``; images that are streamed stay in their file, and are read to it."""
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in ARRAYS})


def to_float(x: Tensor) -> Tensor:
    """uint8 images of any shape -> float32 in [0, 1]; ValueError for any other dtype."""
    if x.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {x.dtype}")
    return x.float().div_(255)


def load(
    name_or_path: str | Path,
    root: str | Path | None = None,
    num_classes: int | None = None,
    *,
    download: bool = False,
    image_size: tuple[int, int] | None = None,
    memory: int | None = None,
    stream: bool = False,
    cache: str | Path | None = None,
    workers: int | None = None,
) -> DataSet:
    """Load a data set.

    Args:
        name_or_path: ``digits``; ``mnist``, ``fashion_mnist``, ``cifar10``, ``cifar100``, ``svhn``, ``imagenette`` or
            ``tiny_imagenet``: ``<root>/<name>.npz``, else the official files under root, as torchvision lays them out
            or in ``<root>/<name>``; the path of an ``.npz`` file; or that of an image folder.
            An ``.npz`` holds ``x_train y_train x_test y_test``. Images are uint8 (or float32/float64 that are exact
            multiples of 1/255), ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` with C = 1 or 3; labels are
            integers ``[N]`` or ``[N, 1]``, every one of 0 .. max present.
            An image folder holds ``train/<class>/*.jpg|png`` and ``val/`` or ``test/`` in the same form, or is
            tiny-imagenet-200. Classes are the sorted folder names, images RGB; they are decoded once, into ``cache``.
        root: a folder to look in too; there the ending ``.npz`` may be left out (``load("set", "data")``). For the
            names above None is the current folder.
        num_classes: overrides the number of classes, for sets that lack some.
        download: whether torchvision may download the official files to root if they are missing.
        image_size: (H, W) an image folder's images are resized (shorter side) and cropped (centre) to; None leaves
            them as they are, and all must have one size. ``imagenette`` needs it.
        memory: bytes an image folder's decoded images may take; above it they are streamed from the cache. Default:
            half of what is available.
        stream: streams them in any case.
        cache: where an image folder's decoded images are kept; default: ``.purify_fast`` in that folder.
        workers: processes that decode, 0 for none but this; default: one per CPU.

    Returns:
        A `DataSet` on the CPU.

    Raises:
        FileNotFoundError: no such data set; says where it was looked for, what is wanted and how to get it.
        OSError: the cache cannot be written.
        ModuleNotFoundError: ``digits`` without scikit-learn, ``svhn`` without scipy.
        ValueError: an argument that does not go with the data set; or the file holds something else, and the message
            names the array, and the first offending index and value, or the files that cannot be decoded.
    """
    name = str(name_or_path)
    for argument, value, least in (("memory", memory, 0), ("workers", workers, 0)):
        if value is not None and value < least:
            raise ValueError(f"{argument} must be at least {least}, got {value}")
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ValueError(f"image_size must be (H, W), both at least 1, got {image_size}")
    if download and name not in NAMES:
        raise ValueError(f"download goes with the data sets {', '.join(NAMES)}, not with {name!r}")
    if name == "digits":
        found: DataSet | Path = _digits(num_classes)
    elif name in NAMES:
        official = find_official(name, Path("." if root is None else root), download, image_size)
        found = official if isinstance(official, Path) else _checked(official, name, num_classes)
    else:
        found = _find(Path(name_or_path), None if root is None else Path(root))
    if isinstance(found, Path) and found.is_dir():
        x, y, classes = read_folder(found, image_size, memory, stream, None if cache is None else Path(cache), workers)
        title = name if name in NAMES else found.resolve().name
        classes = _classes_override(classes, num_classes)
        return DataSet(x["train"], y["train"], x["test"], y["test"], title, classes)
    if stream:
        raise ValueError(f"{name} is not an image folder: only these are streamed")
    if isinstance(found, Path):
        found = _npz(found, num_classes)
    if image_size is not None and tuple(image_size) != found.image_shape[1:]:
        raise ValueError(
            f"{name} has images of (H, W) = {found.image_shape[1:]}, and image_size is {image_size}: only "
            f"image folders are resized"
        )
    return found


def _npz(path: Path, num_classes: int | None) -> DataSet:
    with _open(path) as file:
        missing = [name for name in ARRAYS if name not in file]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}: it needs {', '.join(ARRAYS)}, has {file.files}")
        arrays = {name: _read(file, name) for name in ARRAYS}
    return _checked(arrays, path.stem, num_classes)


def _digits(num_classes: int | None) -> DataSet:
    """8x8 images of 17 grey levels -> 16x16, bilinear; the first 500 of a fixed permutation are the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(
            "the data set 'digits' comes with scikit-learn, which is not installed: pip install 'purify-fast[demo]'"
        ) from error
    raw = load_digits()
    images = torch.from_numpy(raw.images)[:, None] / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    x = (images * 255).round().to(torch.uint8)
    y = torch.from_numpy(raw.target).long()
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(y)))  # RandomState's stream is frozen by numpy
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return DataSet(x[train], y[train], x[test], y[test], "digits", _classes_override(10, num_classes))


def _classes_override(found: int, asked: int | None) -> int:
    if asked is not None and asked < found:
        raise ValueError(f"num_classes is {asked}, but the labels go up to {found - 1}")
    return found if asked is None else asked


def _find(path: Path, root: Path | None) -> Path:
    """An .npz file, or a folder."""
    candidates = [path]
    if root is not None and not path.is_absolute():
        candidates.append(root / path)
        if path.suffix != ".npz":
            candidates.append(root / f"{path}.npz")
    for exists in (Path.is_file, Path.is_dir):
        for candidate in candidates:
            if exists(candidate):
                return candidate
    looked = ", ".join(str(candidate.absolute()) for candidate in candidates)
    raise FileNotFoundError(
        f"no data set {str(path)!r}: looked for {looked}. Give 'digits', one of {', '.join(NAMES)}, an .npz file "
        f"(numpy.savez) with the arrays x_train, x_test (uint8 images) and y_train, y_test (integer labels), or an "
        f"image folder with train/<class>/*.jpg|png and val/ or test/ in the same form"
    )


def _open(path: Path) -> np.lib.npyio.NpzFile:
    try:
        file = np.load(path, allow_pickle=False)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not an .npz file (numpy.savez writes one)") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} is not an .npz file (numpy.savez writes one), it holds one {type(file).__name__}")
    return file


def _read(file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        return file[name]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{name} cannot be read, the file is damaged: {error}") from error
    except ValueError as error:  # an object array would have to be unpickled
        raise ValueError(f"{name} cannot be read safely: it must be a plain array, not Python objects") from error


def _checked(arrays: dict[str, np.ndarray], name: str, num_classes: int | None) -> DataSet:
    x = {part: _images(f"x_{part}", arrays[f"x_{part}"]) for part in ("train", "test")}
    y = {part: _labels(f"y_{part}", arrays[f"y_{part}"]) for part in ("train", "test")}
    if x["train"].shape[1:] != x["test"].shape[1:]:
        shapes = " and ".join(str(list(x[part].shape[1:])) for part in ("train", "test"))
        raise ValueError(f"x_test must have the images' shape of x_train, got [C, H, W] = {shapes}")
    for part in ("train", "test"):
        if len(x[part]) != len(y[part]):
            raise ValueError(f"y_{part} has {len(y[part])} labels for the {len(x[part])} images of x_{part}")
    found = 1 + int(max(y["train"].max(), y["test"].max()))
    if num_classes is None:
        _no_gap(y, found)
        if found < 2:
            raise ValueError("y_train and y_test hold one class only, 0: at least 2 are needed")
    else:
        for part in ("train", "test"):
            _refuse(f"y_{part}", y[part], y[part] >= num_classes, f"labels of 0 .. {num_classes - 1}")
    tensors = {f"x_{part}": torch.from_numpy(x[part]) for part in x} | {
        f"y_{part}": torch.from_numpy(y[part]) for part in y
    }
    return DataSet(**tensors, name=name, num_classes=_classes_override(found, num_classes))


def _refuse(name: str, array: np.ndarray, bad: np.ndarray, allowed: str) -> None:
    """Raise ValueError naming the first offending element, if there is one."""
    if bad.any():
        index = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        raise ValueError(f"{name}[{', '.join(map(str, index))}] is {array[index]}: {name} must hold {allowed}")


def _images(name: str, array: np.ndarray) -> np.ndarray:
    """uint8 NCHW, contiguous."""
    if array.dtype.kind not in "uf" or array.dtype not in (np.uint8, np.float32, np.float64):
        raise ValueError(f"{name} must be uint8 (or float32, float64 in [0, 1]), got {array.dtype}")
    if array.ndim not in (3, 4):
        raise ValueError(f"{name} must be [N, H, W], [N, H, W, C] or [N, C, H, W], got {list(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: its shape is {list(array.shape)}")
    if array.dtype != np.uint8:
        _refuse(name, array, ~np.isfinite(array), "finite values")
        _refuse(name, array, (array < 0) | (array > 1), "values in [0, 1], as floats, or uint8 in 0 .. 255")
        level = np.rint(array * 255)
        # k / 255 is off by an ulp or so, depending on how it was computed
        off = np.abs(array * 255 - level) > 255 * 2 * np.finfo(array.dtype).eps
        _refuse(name, array, off, "multiples of 1/255, which uint8 can hold; quantise it first: (x * 255).round()")
        array = level.astype(np.uint8)
    if array.ndim == 3:
        array = array[:, None]
    else:
        first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
        if first == last:
            why = "both the second and the last" if first else "neither the second nor the last"
            raise ValueError(f"{name} has the shape {list(array.shape)}: {why} dimension can be 1 or 3 channels")
        if last:
            array = array.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(array)


def _labels(name: str, array: np.ndarray) -> np.ndarray:
    """int64 [N]."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must be [N] or [N, 1], got {list(array.shape)}")
    if len(array) == 0:
        raise ValueError(f"{name} is empty")
    _refuse(name, array, array < 0, "labels of 0 and above")
    # a label beyond any class count would otherwise overflow int64 or the count of classes
    _refuse(name, array, array > 2**31 - 1, "labels below 2^31")
    return array.astype(np.int64)


def _no_gap(y: dict[str, np.ndarray], found: int) -> None:
    present = np.union1d(y["train"], y["test"])
    if len(present) == found:
        return
    gap = int((present != np.arange(len(present))).argmax())  # the smallest absent label
    for part in ("train", "test"):
        allowed = f"labels 0 .. C - 1 without a gap, and no image has label {gap} (give num_classes if that is meant)"
        _refuse(f"y_{part}", y[part], y[part] > gap, allowed)
