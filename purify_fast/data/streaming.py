"""Images that are read batch by batch, ahead of the step that needs them: all at once may not fit into memory."""

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

#: How many batches are read, or being read, while the caller works with one.
AHEAD = 2
#: Advice about images that differ in size.
GIVE_SIZE = "give image_size=(H, W), on the command line --size H W"


class StreamedImages:
    """Images ``[N, C, H, W]`` uint8 in an ``.npy`` file that is mapped into memory; indexing reads the asked ones only.

    Args:
        path: the file; it must not change while this is used, which is looked at whenever images are read.
        digest: hash of the images, which stands for them in `purify_fast._tensors.digest`.
        device: where the images go that are read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut off, or holds something else.
    """

    dtype = torch.uint8

    def __init__(self, path: str | Path, digest: str, device: torch.device | str = "cpu"):
        self.path, self.digest = Path(path), digest
        # a tensor resolves "cuda" to a device with an index
        self.device = torch.empty(0, device=device).device
        try:
            array = np.load(self.path, mmap_mode="r")
        except (EOFError, ValueError) as error:
            raise ValueError(f"{self.path} is not a whole .npy file: {error}") from error
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 4:
            raise ValueError(f"{self.path} must hold one uint8 array [N, C, H, W]")
        with warnings.catch_warnings():
            # the warning is that the array cannot be written to, which nobody does
            warnings.simplefilter("ignore")
            self._rows = torch.from_numpy(array)
        self.shape = self._rows.shape
        self._state = self._look()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Some of the images, read now.

        Args:
            index: int64 ``[B]`` of indices in 0 .. N - 1, or a slice.

        Returns:
            uint8 ``[B, C, H, W]`` on ``device``.

        Raises:
            IndexError: an index outside.
            TypeError: anything else as the index.
        """
        if isinstance(index, slice):
            index = torch.arange(len(self))[index]
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
            raise TypeError(f"streamed images are indexed by a slice or an int64 tensor [B], got {index!r}")
        return self.read(index.cpu()).to(self.device)

    def read(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Some of the images, on the CPU; other Python threads run while they are read.

        Args:
            ids: int64 ``[B]`` on the CPU.
            out: uint8 ``[B, C, H, W]`` on the CPU to read them into; None for a new tensor.
        """
        now = self._look()
        # a new file with this name leaves the mapped file unchanged
        if now is not None and self._state is not None and now != self._state and now[0] == self._state[0]:
            raise OSError(f"{self.path} changed while its images were read: run the same command again to decode anew")
        return torch.index_select(self._rows, 0, ids, out=out)

    def _look(self) -> tuple[int, int, int] | None:
        """Facts that change when the file is written to; None once it has no name: nobody writes to it then."""
        try:
            facts = self.path.stat()
        except FileNotFoundError:
            return None
        return facts.st_ino, facts.st_size, facts.st_mtime_ns

    def to(self, device: torch.device | str) -> Self:
        """The same images, read to another device.

        Args:
            device: where the images go that are read.
        """
        images = copy.copy(self)
        images.device = torch.empty(0, device=device).device
        return images


class ResizedImages(StreamedImages):
    """Images that are read with the shorter side resized, bilinearly, and the center cropped, as uint8.

    CIFAR-10 at 256 x 256, where AToP attacks it, takes 9.8 GB; at 32 x 32 it takes 0.15 GB.

    Args:
        images: uint8 ``[N, C, H, W]``; they stay on the CPU.
        size: (H, W) of what is read.
        device: where the images go that are read.
    """

    def __init__(self, images: Tensor, size: tuple[int, int], device: torch.device | str = "cpu"):
        self._stored, self.size = images.cpu(), size
        self.device = torch.empty(0, device=device).device
        self.shape = torch.Size((*images.shape[:2], *size))
        self.digest = f"{digest(self._stored)} at {size[0]} x {size[1]}"

    def read(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        # torchvision takes about a second to import
        from torchvision.transforms.v2 import functional

        small = self._stored.index_select(0, ids)
        sides = list(zip(self.size, small.shape[2:], strict=True))
        factor = max(target / side for target, side in sides)
        large = functional.resize(small, [max(round(factor * side), target) for target, side in sides], antialias=True)
        images = functional.center_crop(large, list(self.size))
        return images if out is None else out.copy_(images)


def read_ahead(x: Tensor | StreamedImages, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Every batch of ``order``, in order: (ids, images).

    If the images are streamed, a thread reads the next `AHEAD` batches while the caller works with one, for a CUDA
    device into pinned memory, from which the copy does not block; no other batches are in memory.

    Args:
        x: uint8 ``[N, C, H, W]``.
        order: int64 tensors ``[B]`` on x's device, the indices of each batch.

    Yields:
        An element of ``order``, and ``x`` at it, uint8 ``[B, C, H, W]`` on x's device.
    """
    if isinstance(x, Tensor):
        for ids in order:
            # faster than x[ids] on a CPU
            yield ids, x.index_select(0, ids)
        return
    cuda = x.device.type == "cuda"
    # copy all indices now: later each copy would wait for the device's work
    rows = [ids.cpu() for ids in order]
    reading: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        for k in range(len(order) + AHEAD):
            if k < len(order):
                out = torch.empty((len(rows[k]), *x.shape[1:]), dtype=x.dtype, pin_memory=cuda)
                reading.append(pool.submit(x.read, rows[k], out))
            if k >= AHEAD:
                yield order[k - AHEAD], reading.popleft().result().to(x.device, non_blocking=True)
