"""Image files decoded in several processes into one array on disk."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from .._process import end_with_parent

#: Pillow's modes with 8 bits a channel.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
#: How many images a process decodes at a time.
CHUNK = 32


def first_size(files: list[Path]) -> tuple[int, int]:
    """(H, W) of the first image that can be decoded; ValueError if none can."""
    for path in files:
        image = _image(path, None)
        if not isinstance(image, str):
            return image.shape[1], image.shape[2]
    raise ValueError(f"none of the {len(files)} training images can be decoded; the first: {_image(files[0], None)}")


def decode(
    files: list[Path], size: tuple[int, int], *, resize: bool, out: Path, workers: int, title: str
) -> dict[int, str]:
    """Decode images into one ``.npy`` file, uint8 ``[N, 3, H, W]``; all of it passes through in chunks.

    Args:
        files: the images, in the order they are written in.
        size: (H, W) of every image in the file.
        resize: whether images are resized and cropped to that size; if not, one of another size is refused.
        out: the file to write.
        workers: processes that decode, 0 for none but this.
        title: what the progress bar says.

    Returns:
        What is wrong with each image that cannot be decoded and is left out, by its number among the files.

    Raises:
        ValueError: an image of another size.
    """
    bar = tqdm(total=len(files), unit="img", desc=title, mininterval=0.1 if sys.stderr.isatty() else 10)
    failed: dict[int, str] = {}
    decoded = contextlib.closing(_decoded(files, size if resize else None, workers))
    with bar, out.open("wb") as file, decoded as images:
        _write_header(file, len(files), size)
        for number, (path, image) in enumerate(zip(files, images, strict=True)):
            bar.update()
            if isinstance(image, str):
                failed[number] = image
            elif image.shape[1:] != size:
                got = " x ".join(map(str, image.shape[1:]))
                raise ValueError(f"{path} has {got} pixels, others {size[0]} x {size[1]}: give image_size=(H, W)")
            else:
                file.write(image.tobytes())
        file.seek(0)
        _write_header(file, len(files) - len(failed), size)
    return failed


def _write_header(file: BinaryIO, count: int, size: tuple[int, int]) -> None:
    # its length does not depend on the count: numpy leaves room for any
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, *size)}
    np.lib.format.write_array_header_1_0(file, header)


def _decoded(files: list[Path], size: tuple[int, int] | None, workers: int) -> Generator[np.ndarray | str, None, None]:
    """Every file's image or what is wrong with it, in order; a bounded number wait."""
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    workers = min(workers, len(chunks))
    if workers <= 1:
        for path in files:
            yield _image(path, size)
        return
    # fork where it is usual: a spawned process would import the caller's script again; these touch only Pillow
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting: deque[Future[list[np.ndarray | str]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(_decode_chunk, chunk, size))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _decode_chunk(files: list[Path], size: tuple[int, int] | None) -> list[np.ndarray | str]:
    return [_image(path, size) for path in files]


def _image(path: Path, size: tuple[int, int] | None) -> np.ndarray | str:
    """RGB uint8 [3, H, W], or a sentence that names the file and says what is wrong with it.

    Transparency and a camera's note on orientation are ignored.
    """
    try:
        with Image.open(path) as file:
            if file.mode not in MODES:
                return f"{path}: its mode is {file.mode}, not one of {', '.join(MODES)}"
            image = file.convert("RGB")
    # a broken file can raise anything
    except Exception as error:
        return f"{path}: {error}"
    if size is not None:
        # torchvision's Resize takes the length of the shorter side: it would not cover a target that is not square
        (height, width), sides = size, (image.height, image.width)
        wide = height * sides[1] < width * sides[0]
        covering = [sides[0] * width // sides[1], width] if wide else [height, sides[1] * height // sides[0]]
        image = functional.center_crop(functional.resize(image, covering), list(size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
