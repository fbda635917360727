"""Image files decoded in several processes into one array on disk."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from .._fingerprint import content_hash
from .._process import end_with_parent

#: Pillow's modes with 8 bits a channel.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
#: How many images a process decodes at a time.
CHUNK = 32
#: How many undecodable files an error names.
NAMED = 10


class Undecodable(ValueError):
    """Images that cannot be decoded.

    Args:
        text: the message.
        failed: what is wrong with each, by its number among the files.
    """

    def __init__(self, text: str, failed: dict[int, str] | None = None):
        super().__init__(text)
        self.failed = failed or {}


def first_size(files: list[Path]) -> tuple[int, int]:
    """(H, W) of the first image that can be decoded; ValueError if none can."""
    for path in files:
        image = _image(path, None)
        if not isinstance(image, str):
            return image.shape[1], image.shape[2]
    raise ValueError(f"none of the {len(files)} training images can be decoded; the first: {_image(files[0], None)}")


def decode(files: list[Path], size: tuple[int, int], *, resize: bool, out: Path, workers: int, title: str) -> str:
    """Decode images into one ``.npy`` file, uint8 ``[N, 3, H, W]``; all of it passes through in chunks.

    Args:
        files: the images, in the order they are written in.
        size: (H, W) of every image in the file.
        resize: whether images are resized and cropped to that size; if not, one of another size is refused.
        out: the file to write.
        workers: processes that decode, 0 for none but this.
        title: what the progress bar says.

    Returns:
        The digest of the written images.

    Raises:
        Undecodable: images that cannot be decoded (all are tried, the first `NAMED` are named).
        ValueError: an image of another size.
    """
    shape = (len(files), 3, *size)
    content = content_hash(torch.uint8, shape)
    failed: dict[int, str] = {}
    bar = tqdm(total=len(files), unit="img", desc=title, mininterval=0.1 if sys.stderr.isatty() else 10)
    with bar, out.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        decoded = _decoded(files, size if resize else None, workers)
        with contextlib.closing(decoded):
            for number, (path, image) in enumerate(zip(files, decoded, strict=True)):
                bar.update()
                if isinstance(image, str):
                    failed[number] = image
                elif image.shape != shape[1:]:
                    got = " x ".join(map(str, image.shape[1:]))
                    raise ValueError(f"{path} has {got} pixels, others {size[0]} x {size[1]}: give image_size=(H, W)")
                elif not failed:
                    pixels = image.tobytes()
                    file.write(pixels)
                    content.update(pixels)
    if failed:
        text = f"{len(failed)} of {len(files)} images cannot be decoded, replace or remove them, or skip them with "
        raise Undecodable(f"{text}on_bad_image (--on-bad-image skip): {named(list(failed.values()))}", failed)
    return content.hexdigest()


def named(failed: list[str]) -> str:
    """The first `NAMED` of many sentences, and how many more there are.

    Args:
        failed: one sentence for each file.
    """
    more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    return "; ".join(failed[:NAMED]) + more


def _decoded(files: list[Path], size: tuple[int, int] | None, workers: int) -> Generator[np.ndarray | str, None, None]:
    """Every file's image or what is wrong with it, in order; a bounded number wait."""
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    workers = min(workers, len(chunks))
    if workers <= 1:
        for chunk in chunks:
            yield from _decode_chunk(chunk, size)
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
        image = functional.resize(image, list(_covering((image.height, image.width), size)))
        image = functional.center_crop(image, list(size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _covering(image: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The (H, W) with the image's proportions that just covers the target's (H, W), rounded down."""
    if target[0] * image[1] < target[1] * image[0]:
        return image[0] * target[1] // image[1], target[1]
    return target[0], image[1] * target[0] // image[0]
