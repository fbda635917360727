"""The counts of the classes of each image's first draws: a table that no question, budget or process changes.

Draws are drawn once. A table in a folder grows from run to run: another radius, another alpha, other images of the data
set or more draws go on from what is there.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..._hashes import digest
from ...attacks.context import TimeIsOver
from ..run.attack_run import Shards
from ..run.cache import RowCache
from .certificates import MOST
from .noisy_draws import Draws, Job

#: Increase this number after a change of what a part of the table contains.
PARTS = 3
#: The number of passes after which the counts are kept.
PASSES = 32


class _NotKept(Exception):
    """There is no part with this number yet."""


class Counted:
    """The counts of images by class, after numbers of draws.

    The draws from `MOST` on are other draws: they choose the class.

    Args:
        noisy: the draws of the images.
        shards: the processes that draw.
        cache: keeps the parts of the table. A part has rows of an image's mark, a number of draws, a class and its
            count among all draws so far, int64 ``[M, 4]``; the draws of the part; and the seconds that they took.
    """

    def __init__(self, noisy: Draws, shards: Shards, cache: RowCache):
        self.noisy, self.shards, self.cache, self.part = noisy, shards, cache, 0
        # Another image with the same index has other counts. 60 bits fit into int64.
        marks = (digest(*pair) for pair in zip(noisy.x, noisy.index, strict=True))
        self.marks = [int(mark[:15], 16) for mark in marks]
        nothing = {start: np.zeros(noisy.classes + 1, dtype=np.int64) for start in (0, MOST)}
        self.known = {mark: dict(nothing) for mark in self.marks}
        self.drawn, self.seconds = 0, 0.0
        with contextlib.suppress(_NotKept):
            while True:
                self._next_part(None)

    def after(self, places: NDArray[np.int64], last: int, until: float) -> NDArray[np.int64]:
        """Count the classes of the images at some places after ``last`` draws, ``[n, classes + 1]``.

        The last column counts predictions without a class. `TimeIsOver` is raised before draws that would begin later
        than ``until``, a time of `time.monotonic`.
        """
        waiting = self._jobs(places, last)
        while jobs := list(itertools.islice(waiting, self.shards.world)):
            if time.monotonic() >= until:
                raise TimeIsOver
            while any(last not in self.known[self.marks[place]] for job in jobs for place in job[0]):
                self._next_part(jobs)
        counts = [self.known[self.marks[place]][last] for place in places.tolist()]
        return np.array(counts, dtype=np.int64).reshape(-1, self.noisy.classes + 1)

    def _jobs(self, places: NDArray[np.int64], last: int) -> Iterator[Job]:
        """Divide the draws that are missing into jobs."""
        missing = defaultdict[int, list[int]](list)
        for place in places.tolist():
            known = self.known[self.marks[place]]
            if last not in known:
                missing[max(number for number in known if number < last)].append(place)
        for first, some in missing.items():
            fit = max(1, PASSES * self.noisy.limit.most // (last - first))
            size = min(fit, -(-len(some) // self.shards.world))
            for start in range(0, len(some), size):
                yield tuple(some[start : start + size]), first, last

    def _next_part(self, jobs: list[Job] | None) -> None:
        def make() -> dict[str, Any]:
            if jobs is None:
                raise _NotKept
            began, rows = time.perf_counter(), []
            made = self.shards.share(jobs, self.noisy.counts)  # type: ignore[arg-type]
            for (places, first, last), counts in zip(jobs, made, strict=True):
                for mark, new in zip((self.marks[place] for place in places), counts, strict=True):
                    total = self.known[mark][first] + new
                    rows += [(mark, last, kind, total[kind]) for kind in np.flatnonzero(total).tolist()]
            drawn = sum(len(places) * (last - first) for places, first, last in jobs)
            return {"rows": torch.tensor(rows), "draws": drawn, "seconds": time.perf_counter() - began}

        named = {"counts": [PARTS, self.noisy.sigma, self.noisy.seed, self.noisy.classes], "part": self.part}
        part = self.cache.values(self.cache.key(named, self.noisy.model), make)
        self.part, self.drawn, self.seconds = self.part + 1, self.drawn + part["draws"], self.seconds + part["seconds"]
        for (mark, last), rows in itertools.groupby(part["rows"].tolist(), itemgetter(0, 1)):
            total = np.zeros(self.noisy.classes + 1, dtype=np.int64)
            for _, _, kind, count in rows:
                total[kind] = count
            # A folder may have counts of other images. Counts that are known stay, whatever another batch rounded.
            if mark in self.known:
                self.known[mark].setdefault(last, total)
