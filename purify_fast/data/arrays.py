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
    """The four `ARRAYS` of an ``.npz`` file, as they are; it may hold more.

    Raises:
        ValueError: the file is another kind of file, damaged, lacks an array, or holds Python objects.
    """
    place, arrays = str(path), {}
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError(f"it holds one {type(file).__name__}")
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
    """Images as uint8 ``[N, C, H, W]``, labels as int64 ``[N]``, and the number of classes.

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
    """uint8 NCHW, contiguous."""
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
    """int64 [N]."""
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
