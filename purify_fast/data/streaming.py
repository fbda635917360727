"""Read images from a file batch by batch, ahead of the program, for data sets that do not fit into memory."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .._tensors import digest

if TYPE_CHECKING:
    from typing_extensions import Self

#: Number of batches that are read ahead while the caller works with a batch.
AHEAD = 2
#: Advice for images that differ in size.
GIVE_SIZE = "give image_size=(H, W), on the command line --size H W"


class StreamedImages:
    """Images in an ``.npy`` file, uint8 ``[N, C, H, W]``. Indexing reads only the chosen images.

    Args:
        path: path of the file, which must not change.
        digest: hash of the images, which `purify_fast._tensors.digest` uses in place of the images.
        device: device of the images that are read.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is cut off, or does not contain such images.
    """

    dtype = torch.uint8

    def __init__(self, path: str | Path, digest: str, device: torch.device | str = "cpu"):
        self.digest = digest
        # Make a tensor, because its device has an index, such as cuda:0, even if ``device`` is "cuda".
        self.device = torch.empty(0, device=device).device
        array = np.load(path, mmap_mode="r")
        if array.dtype != np.uint8 or array.ndim != 4:
            raise ValueError(f"{path} must contain a uint8 array [N, C, H, W]")
        with warnings.catch_warnings():
            # PyTorch warns that this array must not be written to. Ignore the warning, because the array is only read.
            warnings.simplefilter("ignore")
            self._rows = torch.from_numpy(array)
        self.shape = self._rows.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Read images by int64 indices ``[B]`` from 0 to N - 1, or by a slice: uint8 ``[B, C, H, W]`` on ``device``."""
        if isinstance(index, slice):
            index = torch.arange(len(self), device="cpu")[index]
        return self.read(index.cpu()).to(self.device)

    def read(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Read images to the CPU (into ``out``), by int64 ``ids``. Other Python threads can run at the same time."""
        return torch.index_select(self._rows, 0, ids, out=out)

    def to(self, device: torch.device | str) -> Self:
        """Make a copy that reads the same images to another device."""
        images = copy.copy(self)
        images.device = torch.empty(0, device=device).device
        return images


class ResizedImages(StreamedImages):
    """Images that are resized bilinearly and cropped whenever they are read, as `load_dataset` describes."""

    device = torch.device("cpu")

    def __init__(self, images: Tensor, size: tuple[int, int]):
        self._stored, self.size = images.cpu(), size
        self.shape = torch.Size((*images.shape[:2], *size))
        self.digest = f"{digest(self._stored)} at {size[0]} x {size[1]}"

    def read(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        # The import of torchvision takes about a second.
        from torchvision.transforms.v2 import functional

        small = self._stored.index_select(0, ids)
        sides = list(zip(self.size, small.shape[2:], strict=True))
        factor = max(target / side for target, side in sides)
        large = functional.resize(small, [max(round(factor * side), target) for target, side in sides], antialias=True)
        images = functional.center_crop(large, list(self.size))
        return images if out is None else out.copy_(images)


def read_ahead(x: Tensor | StreamedImages, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an epoch, as pairs of indices and images.

    For streamed images, a thread reads the next `AHEAD` batches while the caller works with a batch. For a CUDA device,
    it reads into pinned memory, so that the copy to the device does not block.

    Args:
        x: images, uint8 ``[N, C, H, W]``.
        order: the indices of each batch: int64 tensors ``[B]`` on the device of ``x``.

    Yields:
        An element of ``order``, and the images at these indices, uint8 ``[B, C, H, W]`` on the device of ``x``.
    """
    if isinstance(x, Tensor):
        for ids in order:
            # On a CPU this is faster than x[ids].
            yield ids, x.index_select(0, ids)
        return
    cuda = x.device.type == "cuda"
    # Copy all indices now, because a later copy would wait for the device.
    rows = [ids.cpu() for ids in order]
    reading: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        for k in range(len(order) + AHEAD):
            if k < len(order):
                out = torch.empty((len(rows[k]), *x.shape[1:]), dtype=x.dtype, device="cpu", pin_memory=cuda)
                reading.append(pool.submit(x.read, rows[k], out))
            if k >= AHEAD:
                yield order[k - AHEAD], reading.popleft().result().to(x.device, non_blocking=True)
