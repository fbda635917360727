"""The counts of the classes of each image's first draws: a table that no question, budget or process changes.

Draws are drawn once. A table in a folder grows from run to run: another radius, another alpha, other images of the data
set or more draws go on from what is there.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..._hashes import digest
from ...attacks.attacked_model import logits_of
from ...attacks.context import TimeIsOver
from ...defences.stochastic import StochasticDefence, undecided
from ...ops.philox import Stream, philox, philox_key
from ...protocols import Classifier, draws_for_each_image
from ...speed.agreement import BFLOAT16, FLOAT32, apart
from ...speed.memory import BatchLimit
from ..request.deadline import precision_name
from ..run.attack_run import Shards
from ..run.cache import RowCache
from ..searches.model_tests import check_classes
from .certificates import MOST

Counts = NDArray[np.int64]
#: Some images, by their places, and the first draw and the draw after the last that each of them needs.
Job = tuple[tuple[int, ...], int, int]
#: The sentinels of a run. A batch has all of them; a batch with fewer than four times as many rows has fewer.
SENTINELS = 16
#: The names of a random model's draws begin at this multiple of the image's index (Knuth's multiplicative hash).
SPREAD = 2654435761


class DependentDrawsError(ValueError):
    """The model is no function of one image, so nothing can be proved."""


class _Dtypes(TorchDispatchMode):
    """Collects the dtypes of the floating-point tensors that PyTorch computes within a block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {t.dtype for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()}
        return result


class Draws:
    """Counts the classes that a model gives to noisy copies of images.

    Args:
        model: images ``[B, C, H, W]`` to logits; deterministic, or a random defence with draws for each image.
        x: images ``[N, C, H, W]``, float32 on the CPU.
        index: the images' indices in their data set, which name the draws, int64 ``[N]`` on the CPU.
        sigma: standard deviation of the noise, in image units.
        seed: seed of the noise.
        limit: the largest number of rows in a pass, on the device of the model.

    Raises:
        DependentDrawsError: the logits depend on the rest of the batch, on the place in it, or on the call.
        ValueError: the model is random without draws for each image, or has no logits.
    """

    def __init__(self, model: Classifier, x: Tensor, index: Tensor, *, sigma: float, seed: int, limit: BatchLimit):
        self.model, self.x, self.index, self.sigma, self.seed, self.limit = model, x, index, sigma, seed, limit
        self.key, self.name = philox_key(seed, limit.device), type(model).__name__
        #: Whether the model draws itself: then its draws are named by image and draw, as the noise is.
        self.is_random = isinstance(model, StochasticDefence) and not model.noise_is_off
        if self.is_random and not draws_for_each_image(model):
            raise ValueError(f"model must draw for each image (draws_for_each_image): {self.name} does not promise it")
        self.chance = torch.Generator("cpu").manual_seed(seed)
        which = torch.randint(len(x), (SENTINELS, 1), generator=self.chance, device="cpu")
        rows = [self._rows(place, number, 1) for number, place in enumerate(which)]
        self.rows, self.names = (torch.cat(parts) for parts in zip(*rows, strict=True))
        with _Dtypes() as dtypes:
            self.known = limit.within(lambda: torch.cat([*map(self._predict, self.rows.split(1), self.names.split(1))]))
        self.classes = self.known.shape[1]
        tf32 = precision_name(model, limit.device) == "tf32"
        #: The precisions in which the model computes, for the report.
        self.precision = " and ".join(sorted({str(dtype)[6:] for dtype in dtypes.seen}) + ["tf32"] * tf32)
        #: The rounding that a batch of another shape may cause.
        self.strength = BFLOAT16 if tf32 or any(dtype.itemsize < 4 for dtype in dtypes.seen) else FLOAT32
        # This call finds out how many rows fit into memory.
        tried = torch.arange(self._sizes()[2], device="cpu") % SENTINELS
        limit.within(lambda: self._checked(self.rows[tried], self.names[tried]))

    def _sizes(self) -> tuple[int, int, int]:
        """The numbers of rows, of sentinels and of draws in a pass. A pass of a single row has one of both."""
        most = self.limit.at_most(self.limit.most)
        watched = min(SENTINELS, max(1, most // 4))
        return most, watched, max(1, most - watched)

    def counts(self, job: Job) -> Counts:
        """Count the classes of the draws of a job, ``[n, classes + 1]``. The last column has those without a class."""
        return self.limit.within(lambda: self._counts(*job))

    def _counts(self, places: tuple[int, ...], first: int, last: int) -> Counts:
        # Passes are full: many draws of an image, or all draws of many images.
        counts, room = [], self._sizes()[2]
        for part in torch.tensor(places, device="cpu").split(max(1, room // (last - first))):
            size, total = max(1, room // len(part)), torch.zeros((), dtype=torch.int64, device="cpu")
            for start in range(first, last, size):
                logits = self._checked(*self._rows(part, start, min(size, last - start)))
                classes = logits.argmax(1).masked_fill(undecided(logits), self.classes).view(len(part), -1)
                total = total + F.one_hot(classes, self.classes + 1).sum(1).cpu()
            counts.append(total.numpy())
        return np.concatenate(counts)

    def _rows(self, at: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """The draws of images, ``[n * count, C, H, W]``, and the names of a random model's own draws, int64."""
        x, ids = self.x[at].to(self.key.device), self.index[at].to(self.key.device)
        how: Any = {"stream": Stream.SMOOTHING, "distribution": "normal", "draws": count, "first_draw": first}
        noise = philox(self.key, ids, x[0].numel(), **how).mul_(self.sigma).view(len(x), count, *x.shape[1:])
        names = (ids * SPREAD)[:, None] + torch.arange(first, first + count, device=ids.device)
        return noise.add_(x[:, None]).flatten(0, 1), names.flatten() % 2**32

    def _checked(self, noisy: Tensor, names: Tensor) -> Tensor:
        """The logits of draws, ``[B, classes]``, from passes that also have sentinels, all at random places."""
        most, count, _ = self._sizes()
        watched = torch.randperm(SENTINELS, generator=self.chance, device="cpu")[:count]
        noisy, names = torch.cat([noisy, self.rows[watched]]), torch.cat([names, self.names[watched]])
        order = torch.randperm(len(noisy), generator=self.chance, device="cpu")
        passes = zip(noisy[order].split(most), names[order].split(most), strict=True)
        logits = torch.cat([check_classes(self._predict(*rows), self.classes) for rows in passes])[order.argsort()]
        got = self.known.clone()
        got[watched] = logits[-count:].to(got)
        if changed := int(apart(self.known, got, self.strength, together=True).sum()):
            must = "predict each image for itself and alike in every call, apart from draws that noise_ids names"
            reason = f"the logits of this {self.name} depend on the batch or the call, or have changed"
            raise DependentDrawsError(f"model must {must}, but {reason}: {changed} of {count} rows differ from before")
        return logits[:-count]

    def _predict(self, images: Tensor, names: Tensor) -> Tensor:
        if not self.is_random:
            return logits_of(self.model, images)
        # A defence of this package takes the seed of a call from this generator.
        torch.manual_seed(self.seed)
        with self.model.noise_ids(names):  # type: ignore[attr-defined]
            return logits_of(self.model, images)


# -- counted -----------------------------------------------------------------------------------------------------------

#: Increase this number after a change of what a part of the table contains.
PARTS = 3
#: The number of passes after which the counts are kept.
PASSES = 32


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
        self.noisy, self.shards, self.cache, self.parts, self.drawn, self.seconds = noisy, shards, cache, 0, 0, 0.0
        # Another image with the same index has other counts. 60 bits fit into int64.
        self.marks = [int(digest(*pair)[:15], 16) for pair in zip(noisy.x, noisy.index, strict=True)]
        self.known = {mark: dict.fromkeys((0, MOST), np.zeros(noisy.classes + 1, np.int64)) for mark in self.marks}

    def after(self, places: NDArray[np.int64], last: int, until: float) -> Counts:
        """Count the classes of the images at some places after ``last`` draws, ``[n, classes + 1]``.

        The last column counts predictions without a class. `TimeIsOver` is raised before draws that would begin later
        than ``until``, a time of `time.monotonic`.
        """
        counts = {place: self.known[self.marks[place]] for place in places.tolist()}
        while missing := [place for place in counts if last not in counts[place]]:
            firsts = [max(number for number in counts[place] if number < last) for place in missing]
            some = [place for place, first in zip(missing, firsts, strict=True) if first == firsts[0]]
            # Each process draws for some of the images, in a number of passes.
            fit = max(1, PASSES * self.noisy.limit.most // (last - firsts[0]))
            size = min(fit, -(-len(some) // self.shards.world))
            starts = range(0, len(some), size)[: self.shards.world]
            self._next_part([(tuple(some[start : start + size]), firsts[0], last) for start in starts], until)
        return np.array([known[last] for known in counts.values()], np.int64).reshape(-1, self.noisy.classes + 1)

    def _next_part(self, jobs: list[Job], until: float) -> None:
        """Read the next part of the table, or make it of the jobs if it is not kept."""

        def make() -> dict[str, Any]:
            if time.monotonic() >= until:
                raise TimeIsOver
            began, (_, first, last) = time.perf_counter(), jobs[0]
            marks = np.array([self.marks[place] for places, *_ in jobs for place in places])
            new = np.concatenate(self.shards.share(jobs, self.noisy.counts))  # type: ignore[arg-type]
            total = new + [self.known[mark][first] for mark in marks.tolist()]
            at, classes = total.nonzero()
            rows = np.stack([marks[at], np.full_like(at, last), classes, total[at, classes]], -1)
            seconds = time.perf_counter() - began
            return {"rows": torch.from_numpy(rows), "draws": len(marks) * (last - first), "seconds": seconds}

        named = {"counts": [PARTS, self.noisy.sigma, self.noisy.seed, self.noisy.classes], "part": self.parts}
        part = self.cache.values(self.cache.key(named, self.noisy.model), make)
        self.parts, self.drawn = self.parts + 1, self.drawn + part["draws"]
        self.seconds += part["seconds"]
        totals = defaultdict[tuple[int, int], Counts](lambda: np.zeros(self.noisy.classes + 1, np.int64))
        for mark, last, number, count in part["rows"].tolist():
            totals[mark, last][number] = count
        for (mark, last), total in totals.items():
            # A folder may have counts of other images. Counts that are known stay, whatever another batch rounded.
            self.known.get(mark, {}).setdefault(last, total)
