"""The counts of the classes of each image's first draws: a table that no question, budget or process changes.

Draws are drawn once. A table in a folder grows from run to run: another radius, another alpha, other images of the data
set or more draws go on from what is there.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..._tensors import digest
from ..run.shards import Shards
from .noisy_draws import Draws
from .sequences import MOST

#: The number of passes after which the counts are kept.
PASSES = 32

#: Some images, by their places, and the first draw and the draw after the last that each of them needs.
Job = tuple[tuple[int, ...], int, int]
#: Returns the part of the table with a number that was kept, or makes the part and keeps it.
Keep = Callable[[int, Callable[[], dict[str, Any]]], dict[str, Any]]


class _NotKept(Exception):
    """There is no part with this number yet."""


class Counted:
    """The counts of images by class, after numbers of draws.

    The draws from `MOST` on are other draws: they choose the class.

    Args:
        asked: the draws of the images.
        shards: the processes that draw.
        keep: keeps the parts of the table. A part has rows of an image's mark, a number of draws, a class and its count
            among all draws so far, int64 ``[M, 4]``; the draws of the part; and the seconds that they took.
    """

    def __init__(self, asked: Draws, shards: Shards, keep: Keep):
        self.asked, self.shards, self.keep, self.part = asked, shards, keep, 0
        # Another image with the same index has other counts. 60 bits fit into int64.
        marks = (digest(*pair) for pair in zip(asked.x, asked.index, strict=True))
        self.marks = [int(mark[:15], 16) for mark in marks]
        nothing = {start: np.zeros(asked.classes + 1, dtype=np.int64) for start in (0, MOST)}
        self.known = {mark: dict(nothing) for mark in self.marks}
        self.drawn, self.seconds = 0, 0.0
        with contextlib.suppress(_NotKept):
            while True:
                self._next_part(None)

    def after(self, places: NDArray[np.int64], last: int) -> NDArray[np.int64]:
        """Count the classes of the images at some places after ``last`` draws, ``[n, classes + 1]``.

        The last column counts predictions without a class.
        """
        waiting = self._jobs(places, last)
        while jobs := list(itertools.islice(waiting, self.shards.world)):
            while any(last not in self.known[self.marks[place]] for job in jobs for place in job[0]):
                self._next_part(jobs)
        return np.stack([self.known[self.marks[place]][last] for place in places.tolist()])

    def _jobs(self, places: NDArray[np.int64], last: int) -> Iterator[Job]:
        """Divide the draws that are missing into jobs."""
        missing = defaultdict[int, list[int]](list)
        for place in places.tolist():
            known = self.known[self.marks[place]]
            if last not in known:
                missing[max(number for number in known if number < last)].append(place)
        for first, some in missing.items():
            fit = max(1, PASSES * self.asked.limit.most // (last - first))
            size = min(fit, -(-len(some) // self.shards.world))
            for start in range(0, len(some), size):
                yield tuple(some[start : start + size]), first, last

    def draw(self, job: Job) -> NDArray[np.int64]:
        """Draw for a job, and count, ``[n, classes + 1]``."""
        places, first, last = job
        return self.asked.counts(torch.tensor(places, device="cpu"), first, last)

    def _next_part(self, jobs: list[Job] | None) -> None:
        def make() -> dict[str, Any]:
            if jobs is None:
                raise _NotKept
            began, rows = time.perf_counter(), []
            made = self.shards.share(jobs, self.draw)  # type: ignore[arg-type]
            for (places, first, last), counts in zip(jobs, made, strict=True):
                for mark, new in zip((self.marks[place] for place in places), counts, strict=True):
                    total = self.known[mark][first] + new
                    rows += [(mark, last, kind, total[kind]) for kind in np.flatnonzero(total).tolist()]
            drawn = sum(len(places) * (last - first) for places, first, last in jobs)
            return {"rows": torch.tensor(rows), "draws": drawn, "seconds": time.perf_counter() - began}

        part = self.keep(self.part, make)
        self.part, self.drawn, self.seconds = self.part + 1, self.drawn + part["draws"], self.seconds + part["seconds"]
        found = defaultdict[tuple[int, int], NDArray[np.int64]](
            lambda: np.zeros(self.asked.classes + 1, dtype=np.int64)
        )
        for mark, last, kind, count in part["rows"].tolist():
            found[mark, last][kind] = count
        for (mark, last), total in found.items():
            # A folder may have counts of other images. Counts that are known stay, whatever another batch rounded.
            if mark in self.known:
                self.known[mark].setdefault(last, total)
