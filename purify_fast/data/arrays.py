"""Arrays of an ``.npz`` or of official files: checked, and brought to uint8 NCHW images and int64 labels."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of an ``.npz`` file, as they are.

    Args:
        path: the file; it must hold `ARRAYS`, and may hold more.

    Returns:
        The arrays by their names.

    Raises:
        ValueError: the file is another kind of file, damaged, lacks an array, or holds Python objects.
    """
    with _open(path) as file:
        missing = [name for name in ARRAYS if name not in file]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}: it needs {', '.join(ARRAYS)}, has {file.files}")
        return {name: _read(file, name) for name in ARRAYS}


def check_arrays(arrays: dict[str, np.ndarray], num_classes: int | None) -> tuple[dict[str, Tensor], int]:
    """Images as uint8 ``[N, C, H, W]``, labels as int64 ``[N]``, and the number of classes.

    Args:
        arrays: `ARRAYS`, in any form that `purify_fast.data.load_dataset` takes.
        num_classes: the number of classes; None counts them, and then no label may be missing.

    Returns:
        The tensors by their names, and the number of classes.

    Raises:
        ValueError: anything else in an array; the message names the first offending index and value.
    """
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
    tensors = {f"x_{part}": torch.from_numpy(x[part]) for part in x}
    tensors |= {f"y_{part}": torch.from_numpy(y[part]) for part in y}
    return tensors, chosen_classes(found, num_classes)


def chosen_classes(found: int, asked: int | None) -> int:
    """The number of classes: ``asked``, or if that is None the ``found`` one; ValueError if fewer are asked for."""
    if asked is not None and asked < found:
        raise ValueError(f"num_classes is {asked}, but the labels go up to {found - 1}")
    return found if asked is None else asked


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
    # an object array would have to be unpickled
    except ValueError as error:
        raise ValueError(f"{name} cannot be read safely: it must be a plain array, not Python objects") from error


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
        _refuse(name, array, off, "multiples of 1/255, which uint8 can hold; quantize it first: (x * 255).round()")
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
    # the smallest absent label
    gap = int((present != np.arange(len(present))).argmax())
    for part in ("train", "test"):
        allowed = f"labels 0 .. C - 1 without a gap, and no image has label {gap} (give num_classes if that is meant)"
        _refuse(f"y_{part}", y[part], y[part] > gap, allowed)
