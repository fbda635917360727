"""The official files of well-known data sets, read and downloaded by torchvision.

CIFAR and SVHN are read only if torchvision's checksums of the official files hold: CIFAR's are pickles, which can run
code. MNIST's are read as they are: torchvision keeps checksums of the compressed ones only.
"""

from __future__ import annotations

import gzip
import importlib.util
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np

IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
CLASSES = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "imagenette": "Imagenette",
}
NAMES = (*CLASSES, "tiny_imagenet")
TINY = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def find_official(
    name: str, root: Path, download: bool, image_size: tuple[int, int] | None
) -> Path | dict[str, np.ndarray]:
    """A data set of `NAMES`: the path of its ``.npz`` or image folder, or its arrays.

    Args:
        root: the folder to look in: ``<root>/<name>.npz``, then the official files in torchvision's layout or in
            ``<root>/<name>``; idx files may be compressed (``.gz``).
        download: whether torchvision may fetch missing files to root. Damaged ones are never replaced.
        image_size: (H, W) wanted; of imagenette's archives the smallest is taken whose shorter side suffices.

    Returns:
        A path, or ``x_train y_train x_test y_test``: uint8 ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``, and
        int64 ``[N]``.

    Raises:
        FileNotFoundError: files are missing, or cannot be downloaded. ValueError: a file is damaged, or imagenette
        without ``image_size``. ModuleNotFoundError: SVHN without scipy.
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
    return _svhn(place) if name == "svhn" else _cifar(name, place)


def _wanted(name: str, root: Path, image_size: tuple[int, int] | None) -> dict[Path, list[Path]]:
    """The files that are needed, by the place each would be in; the first place that has all is read."""
    from torchvision import datasets

    if name in ("mnist", "fashion_mnist"):  # not root itself: the files of both have the same names
        return {place: [place / file for file in IDX] for place in (root / CLASSES[name] / "raw", root / name)}
    if name == "imagenette":
        folders = [root / name, root / _archive(image_size)]
        return {place: [place / "train", place / "val"] for place in folders}
    if name == "tiny_imagenet":
        return {place: [place / "train", place / "val"] for place in (root / "tiny-imagenet-200", root / name)}
    if name == "svhn":
        files = [datasets.SVHN.split_list[part][1] for part in ("train", "test")]
    else:
        reader = getattr(datasets, CLASSES[name])
        files = [f"{reader.base_folder}/{file}" for file, _ in _cifar_files(reader)]
    return {place: [place / file for file in files] for place in (root, root / name)}


def _present(wanted: dict[Path, list[Path]]) -> Path | None:
    return next((place for place, files in wanted.items() if all(map(_exists, files))), None)


def _exists(path: Path) -> bool:
    return path.exists() or (path.name in IDX and path.with_name(path.name + ".gz").exists())


def _archive(image_size: tuple[int, int] | None) -> str:
    """imagenette comes with shorter sides of 160, 320 and as photographed."""
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
        call = f"load({name!r}, {str(root)!r}, download=True{size})"
        how = f'get it with: python -c "from purify_fast.data import load; {call}", or --download on the command line'
    gz = ", compressed (.gz) or not" if name in ("mnist", "fashion_mnist") else ""
    return f"no data set {name!r}: looked for {npz.absolute()} (x_train, y_train, x_test, y_test), {places}{gz}; {how}"


def _download(name: str, root: Path, image_size: tuple[int, int] | None) -> None:
    from torchvision import datasets

    if name == "tiny_imagenet":
        raise FileNotFoundError(
            f"torchvision cannot download tiny_imagenet; get it with: curl -LO {TINY} && "
            f"unzip -q tiny-imagenet-200.zip -d {root}"
        )
    reader = getattr(datasets, CLASSES[name])
    root.mkdir(parents=True, exist_ok=True)
    try:
        if name == "imagenette":
            size = {"imagenette2-160": "160px", "imagenette2-320": "320px"}.get(_archive(image_size), "full")
            reader(root, "train", size, download=True)
        elif name == "svhn":
            _needs_scipy()  # torchvision reads what it downloads
            for part in ("train", "test"):
                reader(root, part, download=True)
        else:
            reader(root, train=True, download=True)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
        raise FileNotFoundError(f"{name} could not be downloaded to {root.absolute()}: {error}") from error


def _idx(place: Path) -> dict[str, np.ndarray]:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    arrays = {}
    for file in IDX:
        path = place / file
        try:
            with tempfile.TemporaryDirectory() as aside:
                if not path.is_file():  # torchvision reads uncompressed files only
                    path = path.with_name(file + ".gz")
                    plain = Path(aside) / file
                    with gzip.open(path) as source, plain.open("wb") as target:
                        shutil.copyfileobj(source, target)
                else:
                    plain = path
                read = read_image_file if "images" in file else read_label_file
                tensor = read(str(plain))
        # what torchvision raises for other contents: a bad header, or more or less than it announces
        except (OSError, EOFError, zlib.error, AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no whole idx file ({error}): replace it") from error
        arrays[("x_" if "images" in file else "y_") + ("train" if file.startswith("train") else "test")] = (
            tensor.numpy()
        )
    return arrays


def _check(path: Path, md5: str) -> None:
    from torchvision.datasets.utils import check_integrity

    if not check_integrity(path, md5):
        raise ValueError(
            f"{path} does not have the checksum of the official file (md5 {md5}), so it is not read: it is damaged or "
            f"another file. Remove it and get the official one, or save your arrays as an .npz file"
        )


def _cifar_files(reader) -> list[tuple[str, str]]:
    """(file, md5) of CIFAR's pickles."""
    return [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]


def _cifar(name: str, place: Path) -> dict[str, np.ndarray]:
    from torchvision import datasets

    reader = getattr(datasets, CLASSES[name])
    for file, md5 in _cifar_files(reader):
        _check(place / reader.base_folder / file, md5)
    train, test = reader(place, train=True), reader(place, train=False)
    return {
        "x_train": train.data,
        "y_train": np.array(train.targets),
        "x_test": test.data,
        "y_test": np.array(test.targets),
    }


def _needs_scipy() -> None:
    if importlib.util.find_spec("scipy") is None:
        raise ModuleNotFoundError("svhn's files are read by scipy, which is not installed: pip install scipy")


def _svhn(place: Path) -> dict[str, np.ndarray]:
    from torchvision import datasets

    _needs_scipy()
    arrays = {}
    for part in ("train", "test"):
        _, file, md5 = datasets.SVHN.split_list[part]
        _check(place / file, md5)
        read = datasets.SVHN(place, part)
        arrays[f"x_{part}"], arrays[f"y_{part}"] = read.data, read.labels
    return arrays
