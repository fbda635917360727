"""Data sets by name or path, as uint8 NCHW images: digits, ``.npz`` files, official files, image folders."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .._validation import Range, check_literal
from .streaming import ResizedImages, StreamedImages

#: The data sets that have official files, or an ``.npz`` under this name.
NAMES = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "imagenette", "tiny_imagenet")
DIGITS_TEST = 500
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
#: The treatment of an image that cannot be decoded.
OnBadImage = Literal["refuse", "skip"]
#: When the images of a folder are decoded.
Decode = Literal["once", "each_time"]


@dataclass(frozen=True, repr=False)
class DataSet:
    """Training images and held-out images, with their labels.

    Images larger than memory are `StreamedImages`: `purify_fast.training.fit` takes them as they are, for anything
    else a slice of them is a tensor (``x_test[:500]``, ``x_test[:]``).

    Args:
        x_train: uint8 ``[N, C, H, W]``, 0 black and 255 white.
        y_train: int64 ``[N]``, labels of 0 .. num_classes - 1.
        x_test: the held-out images, of the same form.
        y_test: their labels.
        name: name of the data set, for reports.
        num_classes: how many classes there are, at least 2.
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

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.image_shape))
        images = f"{len(self.x_train)} training and {len(self.x_test)} held-out images"
        return f"DataSet({self.name!r}, {images} of {size}, {self.num_classes} classes, on {self.y_train.device})"

    def to(self, device: torch.device | str) -> DataSet:
        """The same data on another device; images that are streamed stay in their file, and are read to it.

        Args:
            device: where the images and labels are wanted.
        """
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in ARRAYS})


def load_dataset(
    name_or_path: str | Path,
    root: str | Path | None = None,
    num_classes: int | None = None,
    *,
    download: bool = False,
    image_size: tuple[int, int] | None = None,
    stream: bool = False,
    decode: Decode = "once",
    cache: str | Path | None = None,
    workers: int | None = None,
    on_bad_image: OnBadImage = "refuse",
    follow_links: bool = False,
) -> DataSet:
    """Load a data set.

    Args:
        name_or_path: ``digits``; ``mnist``, ``fashion_mnist``, ``cifar10``, ``cifar100``, ``svhn``, ``imagenette`` or
            ``tiny_imagenet``: ``<root>/<name>.npz``, else the official files under root, as torchvision lays them
            out; the path of an ``.npz`` file; or that of an image folder.
            An ``.npz`` holds ``x_train y_train x_test y_test``. Images are uint8 (or float32/float64 that are exact
            multiples of 1/255), ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` with C = 1 or 3; labels are
            integers ``[N]`` or ``[N, 1]``, every one of 0 .. max present.
            An image folder holds ``train/<class>/*.jpg|png`` and ``val/`` or ``test/`` in the same form, or is
            tiny-imagenet-200. Classes are the sorted folder names, images RGB. It may hold tar shards instead, in
            WebDataset's form, uncompressed: ``train/*.tar`` and ``val/*.tar`` or ``test/*.tar``, in which
            ``<name>.jpg|png`` stands beside ``<name>.cls``, the label as a number.
        root: a folder to look in too; there the ending ``.npz`` may be left out (``load_dataset("set", "data")``).
            For the names above None is the current folder.
        num_classes: overrides the number of classes, for sets that lack some.
        download: whether torchvision may download the official files to root if they are missing.
        image_size: (H, W) that images are resized (shorter side) and cropped (center) to; None keeps their sizes, and
            an image folder's images must then all have one size. ``imagenette`` needs it. Images that are not from a
            folder are resized whenever they are read (`purify_fast.data.streaming.ResizedImages`).
        stream: reads an image folder's decoded images batch by batch in any case; by default where they take more than
            half of the memory that is available.
        decode: when an image folder's images are decoded: "once", into ``cache``, or "each_time" that they are read,
            which takes no room on the disk. The pixels are the same. An image that cannot be decoded is then found when
            it is read.
        cache: where an image folder's decoded images are kept, and the index of its shards; default: ``.purify_fast``
            in that folder.
        workers: processes that decode once, threads that decode each time; 0 for only this process; default: one per
            CPU.
        on_bad_image: "refuse" ends with the names of an image folder's images that cannot be decoded; "skip" leaves
            them out, and a warning names them.
        follow_links: whether an image folder's symbolic links may lead out of it.

    Returns:
        A `DataSet` on the CPU.

    Raises:
        FileNotFoundError: no such data set; says where it was looked for, what is wanted and how to get it.
        OSError: the cache cannot be written.
        ModuleNotFoundError: ``svhn`` without scipy.
        ValueError: an argument that the data set does not take; or the file holds something else, and the message
            names the array, and the first offending index and value, or the files that cannot be decoded.
    """
    name = str(name_or_path)
    check_literal("on_bad_image", on_bad_image, OnBadImage)
    check_literal("decode", decode, Decode)
    if decode == "each_time" and on_bad_image == "skip":
        raise ValueError("on_bad_image='skip' needs decode='once': only then all images are decoded beforehand")
    if workers is not None:
        Range(0).check("workers", workers)
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ValueError(f"image_size must be (H, W), both at least 1, got {image_size}")
    if download and name not in NAMES:
        raise ValueError(f"download=True is for the data sets {', '.join(NAMES)}, got {name!r}")
    place: Path | dict[str, np.ndarray] | None = None
    if name in NAMES:
        # torchvision takes about a second to import, and digits and .npz files do not need it
        from .torchvision_sets import find_official

        place = find_official(name, Path("." if root is None else root), download, image_size)
    elif name != "digits":
        place = _find(Path(name_or_path), None if root is None else Path(root))
    if isinstance(place, Path) and place.is_dir():
        # imported only when it is needed
        from .folders import read_folder

        x, y, present = read_folder(
            place,
            image_size,
            stream=stream,
            decode_once=decode == "once",
            workers=workers,
            cache=None if cache is None else Path(cache),
            on_bad_image=on_bad_image,
            follow_links=follow_links,
        )
        classes = chosen_classes(present, num_classes)
        title = name if name in NAMES else place.resolve().name
        return DataSet(x["train"], y["train"], x["test"], y["test"], name=title, num_classes=classes)
    if stream or decode == "each_time":
        what = "streamed" if stream else "decoded each time"
        raise ValueError(f"{name} is not an image folder: only these are {what}")
    if place is None:
        tensors, classes = _digits(), chosen_classes(10, num_classes)
    else:
        tensors, classes = check_arrays(read_npz(place) if isinstance(place, Path) else place, num_classes)
    loaded = DataSet(**tensors, name=place.stem if isinstance(place, Path) else name, num_classes=classes)
    if image_size is None or tuple(image_size) == loaded.image_shape[1:]:
        return loaded
    height, width = image_size
    train, test = (ResizedImages(images[:], (height, width)) for images in (loaded.x_train, loaded.x_test))
    return dataclasses.replace(loaded, x_train=train, x_test=test)


def small_digits() -> tuple[Tensor, Tensor]:
    """The digits as they were published, in their order; digits.txt beside this file names the source.

    Returns:
        uint8 images ``[1797, 1, 8, 8]``, 0 black and 16 white; int64 labels ``[1797]`` of 0 .. 9.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        return torch.from_numpy(file["images"])[:, None], torch.from_numpy(file["labels"]).long()


def _digits() -> dict[str, Tensor]:
    """8x8 images of 17 grey levels -> 16x16, bilinear; the first 500 of a fixed permutation are the test set."""
    small, y = small_digits()
    # in float64 only the last step rounds: the bits are the same on every machine
    images = small.double() / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    x = (images * 255).round().to(torch.uint8)
    # numpy promises never to change RandomState's stream
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(y)))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}


def _find(path: Path, root: Path | None) -> Path:
    """An .npz file, or a folder."""
    candidates = [path]
    if root is not None and not path.is_absolute():
        candidates.append(root / path)
        if path.suffix != ".npz":
            candidates.append(root / f"{path}.npz")
    existing = [path for exists in (Path.is_file, Path.is_dir) for path in candidates if exists(path)]
    if existing:
        return existing[0]
    looked = ", ".join(str(candidate.absolute()) for candidate in candidates)
    raise FileNotFoundError(
        f"no data set {str(path)!r}: looked for {looked}. Give 'digits', one of {', '.join(NAMES)}, an .npz file "
        f"(numpy.savez) with the arrays x_train, x_test (uint8 images) and y_train, y_test (integer labels), or an "
        f"image folder with train/<class>/*.jpg|png and val/ or test/ in the same form"
    )


# ---- arrays: checked, and brought to uint8 NCHW images and int64 labels


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The four `ARRAYS` of an ``.npz`` file, as they are; it may hold more.

    Raises:
        ValueError: the file is another kind of file, damaged, lacks an array, or holds Python objects.
    """
    place, arrays = str(path), {}
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError(f"it holds a single {type(file).__name__}")
        with file:
            for name in [name for name in ARRAYS if name in file]:
                place = f"{name} of {path}"
                arrays[name] = file[name]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{place} is damaged, or not what numpy.savez writes of plain arrays without Python objects: {error}"
        ) from error
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it needs {', '.join(ARRAYS)}, has {file.files}")
    return arrays


def check_arrays(arrays: dict[str, np.ndarray], num_classes: int | None) -> tuple[dict[str, Tensor], int]:
    """Convert images to uint8 ``[N, C, H, W]`` and labels to int64 ``[N]``, and count the classes.

    Args:
        arrays: `ARRAYS`, in any form that `purify_fast.data.load_dataset` takes.
        num_classes: the number of classes; None counts them, and then no label may be missing.

    Returns:
        The tensors by their names, and the number of classes.

    Raises:
        ValueError: anything else in an array; the message names the first offending index and value.
    """
    checked = {name: (_images if name[0] == "x" else _labels)(name, arrays[name]) for name in ARRAYS}
    shapes = [list(checked[name].shape[1:]) for name in ("x_train", "x_test")]
    if shapes[0] != shapes[1]:
        raise ValueError(f"x_test must have the images' shape of x_train, got [C, H, W] = {shapes[0]} and {shapes[1]}")
    for part in ("train", "test"):
        x, y = checked[f"x_{part}"], checked[f"y_{part}"]
        if len(x) != len(y):
            raise ValueError(f"y_{part} has {len(y)} labels for the {len(x)} images of x_{part}")
        if num_classes is not None:
            _refuse(f"y_{part}", y, y >= num_classes, f"labels of 0 .. {num_classes - 1}")
    present = np.union1d(checked["y_train"], checked["y_test"])
    classes = 1 + int(present[-1])
    if num_classes is None and len(present) < classes:
        gap = int((present != np.arange(len(present))).argmax())
        raise ValueError(
            f"the labels go up to {classes - 1}, but no image has label {gap}: give num_classes if that is meant"
        )
    if num_classes is None and classes < 2:
        raise ValueError("y_train and y_test hold one class only, 0: at least 2 are needed")
    return {name: torch.from_numpy(array) for name, array in checked.items()}, chosen_classes(classes, num_classes)


def chosen_classes(present: int, asked: int | None) -> int:
    """The number of classes: ``asked``, or if that is None the ``present`` ones; ValueError if fewer are asked for."""
    if asked is not None and asked < present:
        raise ValueError(f"num_classes is {asked}, but the labels go up to {present - 1}")
    return present if asked is None else asked


def _refuse(name: str, array: np.ndarray, bad: np.ndarray, allowed: str) -> None:
    """Raise ValueError naming the first offending element, if there is one."""
    if bad.any():
        index = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        raise ValueError(f"{name}[{', '.join(map(str, index))}] is {array[index]}: {name} must hold {allowed}")


def _images(name: str, array: np.ndarray) -> np.ndarray:
    """Convert images to uint8 NCHW, contiguous."""
    if array.dtype not in (np.uint8, np.float32, np.float64):
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
        _refuse(name, array, off, "multiples of 1/255, which uint8 can hold; quantize it first: (x * 255).round()")
        array = level.astype(np.uint8)
    if array.ndim == 3:
        return np.ascontiguousarray(array[:, None])
    first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
    if first == last:
        why = "both the second and the last" if first else "neither the second nor the last"
        raise ValueError(f"{name} has the shape {list(array.shape)}: {why} dimension can be 1 or 3 channels")
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2) if last else array)


def _labels(name: str, array: np.ndarray) -> np.ndarray:
    """Convert labels to int64 [N]."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must be [N] or [N, 1], got {list(array.shape)}")
    if len(array) == 0:
        raise ValueError(f"{name} is empty")
    # a label beyond any class count would otherwise overflow int64 or the count of classes
    _refuse(name, array, (array < 0) | (array > 2**31 - 1), "labels of 0 and above, below 2^31")
    return array.astype(np.int64)
