"""The official files of well-known data sets, read and downloaded by torchvision.

CIFAR and SVHN are read only if torchvision's checksums of the official files hold: CIFAR's are pickles, which can run
code. MNIST's are read as they are: torchvision keeps checksums of the compressed ones only.
"""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
READERS: dict[str, Any] = {
    "mnist": datasets.MNIST,
    "fashion_mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "svhn": datasets.SVHN,
    "imagenette": datasets.Imagenette,
}
TINY = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def find_official(
    name: str, root: Path, download: bool, image_size: tuple[int, int] | None
) -> Path | dict[str, np.ndarray]:
    """A well-known data set: the path of its ``.npz`` or image folder, or its arrays.

    Args:
        name: one of `purify_fast.data.datasets.NAMES`.
        root: the folder to look in: ``<root>/<name>.npz``, then the official files in torchvision's layout or in
            ``<root>/<name>``; idx files may be compressed (``.gz``).
        download: whether torchvision may fetch missing files to root. Damaged ones are never replaced.
        image_size: (H, W) wanted; of imagenette's archives the smallest is taken whose shorter side suffices.

    Returns:
        A path, or ``x_train y_train x_test y_test``: uint8 ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``, and
        int64 ``[N]``.

    Raises:
        FileNotFoundError: files are missing, or cannot be downloaded.
        ValueError: a file is damaged, or imagenette without ``image_size``.
        ModuleNotFoundError: SVHN without scipy.
    """
    npz = root / f"{name}.npz"
    if npz.is_file():
        return npz
    if name == "imagenette" and image_size is None:
        raise ValueError("imagenette's images differ in size: give image_size=(H, W)")
    if name == "svhn" and importlib.util.find_spec("scipy") is None:
        raise ModuleNotFoundError("svhn's files are read by scipy, which is not installed: pip install scipy")
    wanted = _wanted(name, root, image_size)
    if download and name in READERS and not _present(wanted):
        root.mkdir(parents=True, exist_ok=True)
        # of several processes one downloads what the others then read
        with FileLock(root / f".{name}.lock"):
            if not _present(wanted):
                _download(name, root, image_size)
    place = _present(wanted)
    if place is None:
        raise FileNotFoundError(_missing(name, root, npz, wanted, image_size))
    if name in ("mnist", "fashion_mnist"):
        names = ("x_train", "y_train", "x_test", "y_test")
        return {name: _idx(_at(place / file)) for name, file in zip(names, IDX, strict=True)}
    return place if name in ("imagenette", "tiny_imagenet") else _verified(name, place)


# ---- where the files are


def _wanted(name: str, root: Path, image_size: tuple[int, int] | None) -> dict[Path, list[Path]]:
    """The files that are needed, by the place each would be in; the first place that has all is read."""
    files: Iterable[str]
    if name in ("mnist", "fashion_mnist"):
        # not root itself: the files of both have the same names
        own, files = root / READERS[name].__name__ / "raw", IDX
    elif name in ("imagenette", "tiny_imagenet"):
        archive = "tiny-imagenet-200" if name == "tiny_imagenet" else _archive(image_size)[0]
        own, files = root / archive, ("train", "val")
    else:
        own, files = root, _checksums(name)
    return {place: [place / file for file in files] for place in (own, root / name)}


def _checksums(name: str) -> dict[str, str]:
    """The md5 of each of the files of SVHN or CIFAR, by its path relative to the place they are in."""
    reader = READERS[name]
    if name == "svhn":
        return {file: md5 for _, file, md5 in (reader.split_list[part] for part in ("train", "test"))}
    listed = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
    return {f"{reader.base_folder}/{file}": md5 for file, md5 in listed}


def _present(wanted: dict[Path, list[Path]]) -> Path | None:
    return next((place for place, files in wanted.items() if all(_at(file).exists() for file in files)), None)


def _at(path: Path) -> Path:
    """The file, or where there is none the compressed one, which is of idx files alone."""
    return path if path.exists() or path.name not in IDX else path.with_name(path.name + ".gz")


def _archive(image_size: tuple[int, int] | None) -> tuple[str, str]:
    """Imagenette comes with shorter sides of 160, 320 and as photographed: a folder's name and torchvision's for it."""
    side = 0 if image_size is None else max(image_size)
    sizes = ((160, ("imagenette2-160", "160px")), (320, ("imagenette2-320", "320px")))
    return next((names for limit, names in sizes if side <= limit), ("imagenette2", "full"))


def _missing(
    name: str, root: Path, npz: Path, wanted: dict[Path, list[Path]], image_size: tuple[int, int] | None
) -> str:
    places = " or ".join(
        f"{place.absolute()} ({', '.join(str(f.relative_to(place)) for f in files if not _at(f).exists())} missing)"
        for place, files in wanted.items()
    )
    if name == "tiny_imagenet":
        how = f"torchvision cannot download it; get it with: curl -LO {TINY} && unzip -q {Path(TINY).name} -d {root}"
    else:
        size = "" if image_size is None or name != "imagenette" else f", image_size={tuple(image_size)}"
        call = f"load_dataset({name!r}, {str(root)!r}, download=True{size})"
        code = f"from purify_fast.data import load_dataset; {call}"
        how = f'get it with: python -c "{code}", or --download on the command line'
    gz = ", compressed (.gz) or not" if name in ("mnist", "fashion_mnist") else ""
    return f"no data set {name!r}: looked for {npz.absolute()} (x_train, y_train, x_test, y_test), {places}{gz}; {how}"


def _download(name: str, root: Path, image_size: tuple[int, int] | None) -> None:
    reader = READERS[name]
    try:
        if name == "imagenette":
            reader(root, "train", _archive(image_size)[1], download=True)
        elif name == "svhn":
            for part in ("train", "test"):
                reader(root, part, download=True)
        else:
            reader(root, train=True, download=True)
    # urllib's errors are OSErrors
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"{name} could not be downloaded to {root.absolute()}: {error}") from error


# ---- what is in them


def _idx(path: Path) -> np.ndarray:
    """The array of an idx file, as MNIST's are: a type, the sizes, and the bytes.

    torchvision's data sets know neither compressed files nor a folder of another name than theirs, and prefer the
    ``training.pt`` that an old release may have left beside them.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = bytearray(file.read())
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as one")
        shape = np.frombuffer(content, ">i4", content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)
    except (OSError, EOFError, zlib.error, IndexError, ValueError) as error:
        raise ValueError(f"{path} is no whole idx file ({error}): replace it") from error


def _verified(name: str, place: Path) -> dict[str, np.ndarray]:
    """The arrays of CIFAR or SVHN, read by torchvision once the checksums of the files are right."""
    for file, md5 in _checksums(name).items():
        if not check_integrity(place / file, md5):
            raise ValueError(
                f"{place / file} does not have the checksum of the official file (md5 {md5}), so it is not read: it "
                f"is damaged or another file. Remove it and get the official one, or save your arrays as an .npz file"
            )
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        if name == "svhn":
            loaded = datasets.SVHN(place, part)
            labels = loaded.labels
        else:
            loaded = READERS[name](place, train=part == "train")
            labels = np.array(loaded.targets)
        arrays |= {f"x_{part}": loaded.data, f"y_{part}": labels}
    return arrays
