"""Images that stay in a file: read batch by batch, ahead of the step that needs them."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

AHEAD = 2  # batches read, or being read, while the caller works with one


class StreamedImages:
    """Images ``[N, C, H, W]`` uint8 in an ``.npy`` file that is mapped into memory; indexing reads the asked ones only.

    Args:
        path: the file; it must not change while this is used.
        digest: hash of the images, which stands for them in `purify_fast._files.digest`.
        device: where the images go that are read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut off, or holds something else.
    """

    dtype = torch.uint8

    def __init__(self, path: str | Path, digest: str, device: torch.device | str = "cpu"):
        self.path, self.digest = Path(path), digest
        self.device = torch.empty(0, device=device).device  # with its index
        try:
            array = np.load(self.path, mmap_mode="r")
        except (EOFError, ValueError) as error:
            raise ValueError(f"{self.path} is no whole .npy file: {error}") from error
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 4:
            raise ValueError(f"{self.path} must hold one uint8 array [N, C, H, W]")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written to, which nobody does
            self._rows = torch.from_numpy(array)
        self.shape = self._rows.shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """The images of an int64 ``[B]`` of indices in 0 .. N - 1, or of a slice: uint8 ``[B, C, H, W]`` on ``device``.

        Raises:
            IndexError: an index outside. TypeError: anything else as the index.
        """
        if isinstance(index, slice):
            return self._rows[index].clone().to(self.device)
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
            raise TypeError(f"streamed images are indexed by a slice or an int64 tensor [B], got {index!r}")
        return self.read(index.cpu()).to(self.device)

    def read(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """The images of ``ids`` (int64 ``[B]`` on the CPU) there, in ``out`` if given; Python's lock is released."""
        return torch.index_select(self._rows, 0, ids, out=out)

    def to(self, device: torch.device | str) -> StreamedImages:
        """The same file, read to ``device``."""
        return StreamedImages(self.path, self.digest, device)


def read_ahead(x: Tensor | StreamedImages, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Every batch of ``order``, in order: (ids, images).

    Of streamed images a thread reads the next `AHEAD` batches while the caller works with one, for a CUDA device into
    pinned memory, from which the copy does not block; no other batches are held.

    Args:
        x: uint8 ``[N, C, H, W]``. order: int64 tensors ``[B]`` on x's device.

    Yields:
        An element of ``order``, and ``x`` at it, uint8 ``[B, C, H, W]`` on x's device.
    """
    if isinstance(x, Tensor):
        for ids in order:
            yield ids, x.index_select(0, ids)  # faster than x[ids] on a CPU
        return
    cuda = x.device.type == "cuda"
    rows = [ids.cpu() for ids in order]  # now: later each would wait for the device's work
    reading: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        for k in range(len(order) + AHEAD):
            if k < len(order):
                out = torch.empty((len(rows[k]), *x.shape[1:]), dtype=x.dtype, pin_memory=cuda)
                reading.append(pool.submit(x.read, rows[k], out))
            if k >= AHEAD:
                yield order[k - AHEAD], reading.popleft().result().to(x.device, non_blocking=True)
