"""Read and download the official files of data sets with torchvision.

torchvision compares the official checksums of CIFAR and SVHN, but not those of MNIST and Fashion-MNIST. This matters
for CIFAR, because its files are pickles, and a pickle can run code.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from torchvision import datasets

READERS: dict[str, Any] = {
    "mnist": datasets.MNIST,
    "fashion_mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "svhn": datasets.SVHN,
}
TINY = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def find_official(name: str, root: Path, download: bool, train: bool) -> Path | dict[str, np.ndarray]:
    """Find a well-known data set: the path of its ``.npz`` or image folder, or its arrays."""
    npz = root / f"{name}.npz"
    if npz.is_file():
        return npz
    lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if download:
        root.mkdir(parents=True, exist_ok=True)
        # With this lock only a single process downloads, and the other processes then read the files.
        lock = FileLock(root / f".{name}.lock")
    try:
        with lock:
            if name in READERS:
                return _arrays(name, root, download, ("train", "test") if train else ("test",))
            folder = root / "tiny-imagenet-200"
            if not folder.is_dir():
                raise FileNotFoundError(f"there is no {folder.name}, which torchvision cannot download: {TINY}")
            return folder
    except ModuleNotFoundError:
        raise
    # A damaged file may raise any error.
    except Exception as error:
        known = "give download=True (--download), or remove damaged files"
        advice = known if name in READERS else "download it yourself"
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
