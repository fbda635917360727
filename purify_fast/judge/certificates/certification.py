"""Certifies images by randomized smoothing (Cohen, Rosenfeld & Kolter, ICML 2019, arXiv 1902.02918).

The smoothed classifier of a model f predicts the class that f gives most often to x + n, n ~ N(0, sigma^2 I). If f
gives the class y to x + n with a probability above Phi(r / sigma), then the smoothed classifier predicts y for every
image at an L2 distance of at most r from x (theorem 1, with all other classes together as the second class). The draws
are counted in a table (`Counted`), and `certificates` makes answers of counts. `refute` attacks a smoothed classifier,
and proves which of the attacked images it does not classify correctly.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from ..._files import check_folder
from ..._settings import digest, weights_fingerprint, without_autocast
from ..._tensors import per_image
from ..._validation import Range, check_counts
from ..._version import __version__
from ...attacks import frozen
from ...attacks.attacked_model import check_labels, logits_of
from ...attacks.base import TimeIsOver
from ...defences.stochastic import MajorityVote, NoisyEnsemble, StochasticDefence, undecided
from ...ops import kernels_now
from ...ops.philox import Stream, philox, philox_key
from ...protocols import Classifier, draws_for_each_image
from ...speed.agreement import BFLOAT16, FLOAT32, apart
from ...speed.memory import BatchLimit
from ...speed.precision import whole_float32_by_default
from ...speed.reading import reading
from ..request.deadline import ASKED, device_of, precision_name
from ..request.preparation import collect, note_of_modes, of_loader
from ..results.cache import RowCache
from ..runner import evaluate
from ..searches.model_tests import check_classes, strays_frozen
from ..shards import Shards
from ..show.report import Report
from .certificates import LARGEST, MOST, NORMAL, Certificates, leads, looks, spent

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
        if changed := int(apart(self.known, got, self.strength).sum()):
            must = "predict each image for itself and alike in every call, apart from draws that noise_ids names"
            reason = f"the logits of this {self.name} depend on the batch or the call, or have changed"
            raise DependentDrawsError(f"model must {must}, but {reason}: {changed} of {count} rows differ from before")
        return logits[:-count]

    def _predict(self, images: Tensor, names: Tensor) -> Tensor:
        if not self.is_random:
            return logits_of(self.model, images)
        # Only the named draws get the same seed in every call. What a part draws by itself differs, and is refused.
        seeds = torch.Generator(self.key.device).manual_seed(self.seed)
        with self.model.noise_ids(names, seeds):  # type: ignore[attr-defined]
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
        until: the time of `time.monotonic` after which no draws begin.
    """

    def __init__(self, noisy: Draws, shards: Shards, cache: RowCache, until: float):
        self.noisy, self.shards, self.cache, self.until = noisy, shards, cache, until
        self.parts, self.drawn, self.seconds = 0, 0, 0.0
        # Another image with the same index has other counts. 60 bits fit into int64.
        self.marks = [int(digest(*pair)[:15], 16) for pair in zip(noisy.x, noisy.index, strict=True)]
        self.known = {name: dict.fromkeys((0, MOST), np.zeros(noisy.classes + 1, np.int64)) for name in self.marks}

    def after(self, places: NDArray[np.int64], last: int) -> Counts:
        """Count the classes of the images at some places after ``last`` draws, ``[n, classes + 1]``.

        The last column counts predictions without a class. `TimeIsOver` is raised before draws that begin too late.
        """
        counts = {place: self.known[self.marks[place]] for place in places.tolist()}
        while missing := [place for place in counts if last not in counts[place]]:
            firsts = {place: max(number for number in counts[place] if number < last) for place in missing}
            first = firsts[missing[0]]
            some = [place for place in missing if firsts[place] == first]
            # Each process draws for some of the images, in a number of passes.
            size = min(max(1, PASSES * self.noisy.limit.most // (last - first)), -(-len(some) // self.shards.world))
            starts = range(0, len(some), size)[: self.shards.world]
            self._next_part([(tuple(some[start : start + size]), first, last) for start in starts])
        return np.array([totals[last] for totals in counts.values()], np.int64).reshape(-1, self.noisy.classes + 1)

    def _next_part(self, jobs: list[Job]) -> None:
        """Read the next part of the table, or make it of the jobs if it is not kept."""

        def make() -> dict[str, Any]:
            if time.monotonic() >= self.until:
                raise TimeIsOver
            began, (_, first, last) = time.perf_counter(), jobs[0]
            marks = np.array([self.marks[place] for places, *_ in jobs for place in places])
            new = np.concatenate(self.shards.share(jobs, self.noisy.counts))  # type: ignore[arg-type]
            total = new + [self.known[name][first] for name in marks.tolist()]
            at, classes = total.nonzero()
            rows = np.stack([marks[at], np.full_like(at, last), classes, total[at, classes]], -1)
            seconds = time.perf_counter() - began
            return {"rows": torch.from_numpy(rows), "draws": len(marks) * (last - first), "seconds": seconds}

        named = {"counts": [PARTS, self.noisy.sigma, self.noisy.seed, self.noisy.classes], "part": self.parts}
        part = self.cache.values(self.cache.key(named, self.noisy.model), make)
        self.parts += 1
        self.drawn, self.seconds = self.drawn + part["draws"], self.seconds + part["seconds"]
        totals = defaultdict[tuple[int, int], Counts](lambda: np.zeros(self.noisy.classes + 1, np.int64))
        for name, last, number, count in part["rows"].tolist():
            totals[name, last][number] = count
        for (name, last), total in totals.items():
            # A folder may have counts of other images. Counts that are known stay, whatever another batch rounded.
            self.known.get(name, {}).setdefault(last, total)


# -- certifies images by randomized smoothing (Cohen, Rosenfeld & Kolter, ICML 2019, arXiv 1902.02918) -----------------


def steps_of(sigma: float, radii: Sequence[float], alpha: float, draws: int, **counts: int) -> list[int]:
    """The numbers of draws after which the counts are kept: the looks, and also all draws for a largest radius.

    Raises:
        ValueError: ``draws`` or another of the counts is not allowed, or even right draws alone cannot prove the
            largest of the radii.
    """
    check_counts(draws=draws, **counts)
    Range(1, MOST, below=True).check("draws", draws)
    steps = looks(draws) if radii else sorted({*looks(draws), draws})
    p = NORMAL.cdf(max(radii, default=0.0) / sigma)
    # Right draws alone prove a probability above p if p^n is at most the alpha that may be spent.
    if not steps or p == 1 or p ** steps[-1] > (spent(steps[-1], p, alpha) if radii else alpha):
        few = f"{draws} cannot prove the radius {max(radii, default=0.0)} at sigma {sigma} and alpha {alpha}"
        raise ValueError(f"draws must be more, or radius smaller: {few}")
    return steps


@whole_float32_by_default()
@torch.inference_mode(False)
@torch.no_grad()
def certify(
    model: Classifier,
    x: Tensor | Iterable[Sequence[Tensor]],
    y: Tensor | None = None,
    *,
    sigma: float,
    radius: float | Sequence[float] | None = None,
    draws: int = 100_000,
    alpha: float = 0.001,
    choosing: int = 100,
    batch_size: int = 1000,
    seed: int = 0,
    seconds: float = math.inf,
    index: Tensor | Sequence[int] | None = None,
    out: str | Path | None = None,
    name: str = "model",
    revision: str | None = None,
    progress: bool = True,
    together: bool = True,
) -> Certificates:
    """Certify the smoothed classifier of a model within L2 balls around images.

    Without ``radius``, each image gets its largest radius, as papers report it: the class of most of ``choosing`` draws
    is tested by ``draws`` others, and the radius follows from the Clopper-Pearson bound of its probability; without a
    radius, the classifier abstains. With ``radius``, the question is whether each image is certified there, which few
    draws answer. The class that is tested is then the label, or without labels the class of most of ``choosing`` draws.

    Noisy images are not clamped to [0, 1]. The model itself predicts, outside of the caller's autocast; to certify its
    frozen copy, give `purify_fast.frozen_copy(model, x)`. Draws are tied to the seed, the image's index and the draw's
    index, so the certificates do not depend on ``batch_size``, on the number of processes, or on interruptions, except
    where rounding moves a logit across a tie.

    Each batch has up to 16 rows at random places whose logits are known. If they change, the run is refused, and the
    counts that it has kept are removed.

    Args:
        model: images ``[B, C, H, W]``, float32, to logits ``[B, classes]``: a deterministic module or function, or a
            random defence of this package with ``draws_for_each_image``, whose own draws count as a part of the noise.
            `purify_fast.methods.diffusion.DiffusionPurifier.one_shot` makes a model of a diffusion purifier.
        x: images ``[N, C, H, W]``, uint8 or floating point in [0, 1], a tensor or a NumPy array; or, without ``y``, a
            DataLoader of batches (images, labels).
        y: labels, integers ``[N]``. None: no accuracy is known, but each image has a class and a radius.
        sigma: standard deviation of the noise in image units, above 0.
        radius: L2 radius in image units, at least 0, or several radii. The draws of an image end when it is known for
            each radius whether the model's probability of the class is large enough. None: the largest radius.
        draws: number of draws for an image, beside ``choosing``. With ``radius``, it is the largest number: the last
            look is after the largest of the numbers of `looks` up to it, and then an image is undecided at
            the radii that are open.
        alpha: the largest probability that an image gets a wrong certificate, for all its radii together, in (0, 1).
        choosing: number of draws that choose the class, and count for nothing else.
        batch_size: largest number of rows in a forward pass. It is halved when memory runs out.
        seed: seed of the noise, in [0, 2^31).
        seconds: the time after which no further draws begin, in seconds, above 0. A note says how many images are
            unfinished. With ``out``, the same call goes on with them.
        index: the images' indices in their data set, integers ``[N]`` in [0, 2^31), all different. An image then has
            the same draws among any other images. Default: 0 to N - 1.
        out: a folder. The counts of the draws are kept in ``out/rows``, and a later call, also with other images, radii
            or ``alpha``, or with more ``draws``, draws only what is missing there.
        name: name of the model in the report.
        revision: a name for the model's code, as in `evaluate`.
        progress: whether to show a progress bar, in draws.
        together: whether the processes of torch's default process group share the work.

    Returns:
        `Certificates`; every process returns the same.

    Raises:
        ValueError: a wrong shape, dtype, range or setting; a radius that even right draws alone cannot prove; or the
            model's draws are not independent, because its logits depend on the rest of the batch or on the call.
        TypeError: an argument has a wrong type.
    """
    check_folder("out", out)
    radii = () if radius is None else tuple(np.atleast_1d(radius).tolist())
    if not radii and radius is not None:
        raise ValueError("radius must be a number or at least one number, got none")
    Range(0, LARGEST, below=True).check("seed", seed)
    # A fraction is refused. Unlike a count, the seed may be 0.
    check_counts(seed=seed or 1)
    Range(0, above=True).check("seconds", seconds)
    until = time.monotonic() + seconds
    images, y = of_loader(x, y)
    images, labels, notes = collect(images, torch.zeros(len(images), dtype=torch.int64) if y is None else y)
    images, labels, device = images.cpu(), labels.cpu(), device_of(model, images)
    n, data = len(labels), digest(images, labels)
    # Draws choose the class that is tested. Until then, none is tested.
    extra = choosing if y is None or not radii else 0
    zeros, ids = np.zeros(n, dtype=np.int64), None if index is None else torch.as_tensor(index).cpu().numpy()
    result = Certificates(zeros, zeros.copy(), sigma, radii, alpha, notes=notes, index=ids)  # type: ignore[arg-type]
    result.labels[:] = -1 if y is None else labels.numpy()
    result.tested[:] = -1 if extra else labels.numpy()
    if radii == (0.0,) and y is not None:
        result.refuted[0.0] = np.zeros(n, dtype=np.bool_)
    steps = steps_of(result.sigma, result.radii, result.alpha, draws, batch_size=batch_size, choosing=choosing)
    if radii and steps[-1] < draws:
        notes.append(f"the draws end at {steps[-1]}, the last look within {draws} draws")
    with Shards(together) as shards, contextlib.ExitStack() as stack:
        notes += note_of_modes(model, name)
        generators = torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [])
        for block in (generators, without_autocast(device), frozen(model), reading(model)):
            stack.enter_context(block)
        limit = BatchLimit(int(batch_size), device)
        with strays_frozen(model, stack) as strays:
            index = torch.from_numpy(result.index)
            noisy = Draws(model, images, index, sigma=result.sigma, seed=int(seed), limit=limit)
        notes += note_of_modes(model, name, strays) if strays else []
        if y is not None:
            check_labels("y", labels, noisy.classes)
        # A function has no weights.
        weights = weights_fingerprint(model) if isinstance(model, nn.Module) else ""
        result.about.update(name=name, predicted_by=type(model).__name__, precision=noisy.precision)
        result.about.update(version=f"purify_fast {__version__}, PyTorch {torch.__version__}", weights=weights)
        result.about.update(seed=str(int(seed)), most_draws=str(steps[-1]), data=data)
        same = {"images": [data, result.index.tolist()], "model": [weights, noisy.classes]}
        shards.check_same(same | {"certificate": [y is None, sigma, radii, alpha, steps[-1], int(seed), choosing]})
        cache = RowCache(None if out is None or shards.rank > 0 else Path(out), kernels_now(device), revision)
        # Counts are found again for other images, so the model answers the same images in every call.
        some = torch.rand((ASKED, *images.shape[1:]), generator=torch.Generator().manual_seed(0), device="cpu")
        cache.register(name, model, some.to(device))
        stack.push(lambda kind, *_: cache.remove_written() if kind is DependentDrawsError else None)
        counted = Counted(noisy, shards, cache, until)
        if shards.rank > 0:
            return Certificates.from_json(shards.follow(noisy.counts))  # type: ignore[arg-type]
        bar = stack.enter_context(tqdm(desc=f"{name}: certificates", unit="draw", disable=not progress))
        with contextlib.suppress(TimeIsOver):
            _cohen(result, counted, extra, steps, bar)
        if unfinished := result.unfinished.sum():
            notes.append(f"{unfinished} of {n} images are unfinished after {seconds} seconds")
        # Draws of earlier runs took time too.
        took = counted.seconds / max(1, counted.drawn) * (result.draws.sum() + extra * n)
        result.about.update(choosing_draws=str(extra), seconds=f"{took:.1f}")
        shards.end(result.to_json)
    return result


def _cohen(result: Certificates, counted: Counted, n0: int, steps: Sequence[int], bar: tqdm[Any]) -> None:
    """Run algorithm CERTIFY of Cohen et al. (section 3.2) on all images at once.

    The n draws, which are the last of ``steps``, are counted in steps, so that a run may end after each of them and go
    on. With radii, the draws of an image end when these are answered.
    """
    at = np.arange(len(result.draws))
    if n0:
        # The last column of counts has predictions without a class.
        result.tested[:] = counted.after(at, MOST + n0)[:, :-1].argmax(1)
    for n in steps:
        bar.total = bar.n + int((steps[-1] - result.draws[at]).sum())
        counts = counted.after(at, n)
        bar.update(int((n - result.draws[at]).sum()))
        result.right[at], result.draws[at] = counts[np.arange(len(at)), result.tested[at]], n
        if result.radii:
            at = at[_stay_open(result, at, counts)]
    # All draws are used up. `Certificates` computes the lower bound of p_A, and the radius, or abstains.
    _count(result, np.arange(len(result.draws)))


def _count(result: Certificates, at: NDArray[np.int64]) -> None:
    """Let the draws so far of images at some places count for each question without an answer."""
    now, before = np.stack([result.right[at], result.draws[at]], -1)[:, None], result.decided[at]
    result.decided[at] = np.where(before[..., 1:] > 0, before, now)


def _stay_open(result: Certificates, at: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Look at the draws of images at some places, with their counts by class. Return those that go on, bool ``[n]``.

    An answer stays: later looks do not change it.
    """
    _count(result, at)
    answer = result.answers()[at]
    go_on = (answer == 0).any(1)
    if result.radii == (0.0,):
        # Radius 0 alone asks which class is the most frequent, which may have less than half of the draws.
        rivals = np.where(np.arange(counts.shape[1]) == result.tested[at, None], -1, counts).max(1)
        lead = leads(result.right[at], rivals, counts.shape[1] - 1, result.alpha)
        if result.refuted:
            result.refuted[0.0][at] = lead == -1
        go_on = (answer[:, 0] != 1) & (lead == 0)
    # A look without an answer does not count while draws go on.
    result.decided[at] = np.where((go_on[:, None] & (answer == 0))[..., None], 0, result.decided[at])
    return go_on


# -- attacks on smoothed classifiers ----------------------------------------------------------------------------------

#: An attacked image is moved towards the image until its distance is this share below the radius, against rounding.
INSIDE = 1e-6


class _Smoothed(NoisyEnsemble):
    """The noisy model whose majority is attacked. Its class promises what an evaluation cannot see in a few draws."""

    draws_for_each_image = True


def refute(
    certificates: Certificates,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    radius: float,
    votes: int = 10,
    draws: int = 100_000,
    batch_size: int = 1000,
    **settings: Any,
) -> tuple[Certificates, Report]:
    """Attack the smoothed classifier within an L2 radius, and add the images that fall to the certificates.

    `purify_fast.evaluation.evaluate` attacks the majority of ``votes`` noisy predictions. A fallen image counts as
    refuted only if confidence sequences prove that the model gives another class more often than the label there, with
    the probability ``alpha`` of an error for each image, because a vote of few draws may be wrong by chance. Without
    this proof, the answer is left open, even if the label has less than half of the draws.

    Args:
        certificates: the certificates of these images; they are not changed.
        model: the module that was certified.
        x: the images that were certified, ``[N, C, H, W]``.
        y: their labels, integers ``[N]``.
        radius: L2 radius of the attacks in image units, above 0.
        votes: number of predictions of which attacks and the first judgement take the majority.
        draws: largest number of draws of an attacked image.
        batch_size: largest number of noisy images in a forward pass of the proof.
        **settings: further keywords of `evaluate`, such as ``attacks``, ``steps``, ``out`` or ``name``. The default of
            ``protocol`` is "strong", that of ``seed`` is the seed of the certificates, and that of ``name`` says that
            the smoothed classifier is attacked. A ``config`` does not change these three.

    Returns:
        The certificates with `Certificates.refuted` at this radius, and the report of the attacks.

    Raises:
        ValueError: the images or the model are not those of the certificates, or a setting is not allowed.
        TypeError: a setting is one that this function sets itself.
    """
    sigma, alpha, about = certificates.sigma, certificates.alpha, certificates.about
    usual: dict[str, Any] = {"seed": int(about["seed"]), "name": f"{about['name']}, smoothed with sigma {sigma:g}"}
    settings = usual | ({} if "attacks" in settings else {"protocol": "strong"}) | settings
    images, labels, _ = collect(x, y)
    steps_of(sigma, (0.0,), alpha, draws, batch_size=batch_size)
    same = isinstance(model, nn.Module) and weights_fingerprint(model) == about["weights"]
    if not same or digest(images.cpu(), labels.cpu()) != about["data"]:
        raise ValueError("model, x and y must be the module, images and labels of the certificates, got others")
    majority = MajorityVote(_Smoothed(model, sigma, samples=1, clamp=False).eval(), votes)
    report = evaluate(majority, images, labels, eps=radius, norm="l2", n_eval=1, **settings)
    together = "config" not in settings or settings["config"].together
    with Shards(together) as shards:
        # Only the first process has the attacked images.
        number, points = shards.from_first(lambda: _points(report, images.cpu(), radius))
    wrong = np.zeros(len(labels), dtype=bool)
    if len(points):
        # Other draws than those of the certificates. An image may have several points, of which each may err.
        how: Any = {"draws": draws, "batch_size": batch_size, "together": together, "name": "attacked images"}
        how |= {"seed": (settings["seed"] + 1) % LARGEST, "progress": settings.get("progress", True)}
        alpha /= int(np.bincount(number).max())
        judged = certify(model, points, labels[number], sigma=sigma, radius=0.0, alpha=alpha, **how)
        wrong[number[judged.refuted[0.0]]] = True
    about = about | {"protocol": str(report.about.get("protocol", "own attacks")), "votes": str(votes)}
    return replace(certificates, refuted={**certificates.refuted, float(radius): wrong}, about=about), report


def _points(report: Report, x: Tensor, radius: float) -> tuple[NDArray[np.int64], Tensor]:
    """The images that are misclassified clean and the attacked images that fell, and their numbers before them."""
    adversarial: Any = report.adversarial
    wrong = np.flatnonzero(~report.rows[0].robust)
    number = np.concatenate([wrong, adversarial.indices])
    moved = torch.cat([x[wrong], torch.from_numpy(adversarial.images)]).double() - x[number].double()
    # An attack of a list may have a larger ball of its own.
    shrink = radius * (1 - INSIDE) / moved.flatten(1).norm(dim=1).clamp(min=radius * (1 - INSIDE))
    return number, (x[number] + moved * per_image(shrink, moved)).float()
