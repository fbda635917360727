"""The official files of well-known data sets, read and downloaded by torchvision.

CIFAR and SVHN are read only if torchvision's checksums of the official files hold: CIFAR's are pickles, which can run
code. MNIST's are read as they are: torchvision keeps checksums of the compressed ones only.
"""

from __future__ import annotations

import importlib.util
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity, extract_archive

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
    wanted = _wanted(name, root, image_size)
    place = _present(wanted)
    if place is None and download:
        _download(name, root, image_size)
        place = _present(wanted)
    if place is None:
        raise FileNotFoundError(_missing(name, root, npz, wanted, image_size))
    if name in ("mnist", "fashion_mnist"):
        return _idx(place)
    if name in ("imagenette", "tiny_imagenet"):
        return place
    return _svhn(place) if name == "svhn" else _cifar(READERS[name], place)


# ---- where the files are


def _wanted(name: str, root: Path, image_size: tuple[int, int] | None) -> dict[Path, list[Path]]:
    """The files that are needed, by the place each would be in; the first place that has all is read."""
    if name in ("mnist", "fashion_mnist"):
        # not root itself: the files of both have the same names
        return {place: [place / file for file in IDX] for place in (root / READERS[name].__name__ / "raw", root / name)}
    if name == "imagenette":
        folders = [root / name, root / _archive(image_size)]
        return {place: [place / "train", place / "val"] for place in folders}
    if name == "tiny_imagenet":
        return {place: [place / "train", place / "val"] for place in (root / "tiny-imagenet-200", root / name)}
    files = _svhn_files() if name == "svhn" else _cifar_files(READERS[name])
    return {place: [place / file for file in files] for place in (root, root / name)}


def _svhn_files() -> dict[str, str]:
    """The md5 of each of SVHN's files."""
    return {datasets.SVHN.split_list[part][1]: datasets.SVHN.split_list[part][2] for part in ("train", "test")}


def _cifar_files(reader: Any) -> dict[str, str]:
    """The md5 of each of CIFAR's pickles, by its path relative to the place they are in."""
    listed = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
    return {f"{reader.base_folder}/{file}": md5 for file, md5 in listed}


def _present(wanted: dict[Path, list[Path]]) -> Path | None:
    return next((place for place, files in wanted.items() if all(map(_exists, files))), None)


def _exists(path: Path) -> bool:
    return path.exists() or (path.name in IDX and _compressed(path).exists())


def _compressed(path: Path) -> Path:
    return path.with_name(path.name + ".gz")


def _archive(image_size: tuple[int, int] | None) -> str:
    """Imagenette comes with shorter sides of 160, 320 and as photographed."""
    side = 0 if image_size is None else max(image_size)
    return "imagenette2-160" if side <= 160 else "imagenette2-320" if side <= 320 else "imagenette2"


def _missing(
    name: str, root: Path, npz: Path, wanted: dict[Path, list[Path]], image_size: tuple[int, int] | None
) -> str:
    places = " or ".join(
        f"{place.absolute()} ({', '.join(str(file.relative_to(place)) for file in files if not _exists(file))} missing)"
        for place, files in wanted.items()
    )
    if name == "tiny_imagenet":
        how = f"get it with: curl -LO {TINY} && unzip -q tiny-imagenet-200.zip -d {root}"
    else:
        size = "" if image_size is None or name != "imagenette" else f", image_size={tuple(image_size)}"
        call = f"load_dataset({name!r}, {str(root)!r}, download=True{size})"
        code = f"from purify_fast.data import load_dataset; {call}"
        how = f'get it with: python -c "{code}", or --download on the command line'
    gz = ", compressed (.gz) or not" if name in ("mnist", "fashion_mnist") else ""
    return f"no data set {name!r}: looked for {npz.absolute()} (x_train, y_train, x_test, y_test), {places}{gz}; {how}"


def _download(name: str, root: Path, image_size: tuple[int, int] | None) -> None:
    if name == "tiny_imagenet":
        raise FileNotFoundError(
            f"torchvision cannot download tiny_imagenet; get it with: curl -LO {TINY} && "
            f"unzip -q tiny-imagenet-200.zip -d {root}"
        )
    reader = READERS[name]
    root.mkdir(parents=True, exist_ok=True)
    try:
        if name == "imagenette":
            size = {"imagenette2-160": "160px", "imagenette2-320": "320px"}.get(_archive(image_size), "full")
            reader(root, "train", size, download=True)
        elif name == "svhn":
            # torchvision reads what it downloads
            _needs_scipy()
            for part in ("train", "test"):
                reader(root, part, download=True)
        else:
            reader(root, train=True, download=True)
    # urllib's errors are OSErrors
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"{name} could not be downloaded to {root.absolute()}: {error}") from error


# ---- what is in them


def _idx(place: Path) -> dict[str, np.ndarray]:
    """MNIST's and Fashion-MNIST's arrays.

    The files are read by torchvision's own functions, not by its data sets: those know neither compressed files nor a
    folder of another name than theirs, and prefer the ``training.pt`` that an old release may have left beside them.
    """
    arrays = {}
    for file in IDX:
        path = place / file if (place / file).is_file() else _compressed(place / file)
        read = read_image_file if "images" in file else read_label_file
        try:
            with tempfile.TemporaryDirectory() as aside:
                if path.suffix == ".gz":
                    extract_archive(path, aside)
                tensor = read(str(Path(aside) / file if path.suffix == ".gz" else path))
        # what torchvision raises for other contents: a bad header, or more or less than it announces
        except (OSError, EOFError, zlib.error, AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no whole idx file ({error}): replace it") from error
        kind, part = "x" if "images" in file else "y", "train" if file.startswith("train") else "test"
        arrays[f"{kind}_{part}"] = tensor.numpy()
    return arrays


def _verified(read: Callable[[], Any], place: Path, files: dict[str, str]) -> Any:
    """What torchvision reads; it looks at the checksums first, and this names the file whose checksum is another."""
    try:
        return read()
    except RuntimeError as error:
        for file, md5 in files.items():
            if not check_integrity(place / file, md5):
                raise ValueError(
                    f"{place / file} does not have the checksum of the official file (md5 {md5}), so it is not read: "
                    f"it is damaged or another file. Remove it and get the official one, or save your arrays as an "
                    f".npz file"
                ) from error
        raise


def _cifar(reader: Any, place: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        found = _verified(partial(reader, place, train=part == "train"), place, _cifar_files(reader))
        arrays |= {f"x_{part}": found.data, f"y_{part}": np.array(found.targets)}
    return arrays


def _needs_scipy() -> None:
    if importlib.util.find_spec("scipy") is None:
        raise ModuleNotFoundError("svhn's files are read by scipy, which is not installed: pip install scipy")


def _svhn(place: Path) -> dict[str, np.ndarray]:
    _needs_scipy()
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        found = _verified(partial(datasets.SVHN, place, part), place, _svhn_files())
        arrays |= {f"x_{part}": found.data, f"y_{part}": found.labels}
    return arrays
