"""Certifies images by randomized smoothing (Cohen, Rosenfeld & Kolter, ICML 2019, arXiv 1902.02918).

The smoothed classifier of a model f predicts the class that f gives most often to x + n, n ~ N(0, sigma^2 I). If f
gives the class y to x + n with a probability above Phi(r / sigma), then the smoothed classifier predicts y for every
image at an L2 distance of at most r from x (theorem 1, with all other classes together as the second class). The draws
are counted in a table (`counted`), and `certificates` makes answers of counts.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ..._hashes import digest, weights_fingerprint
from ..._places import check_folder
from ..._settings import without_autocast
from ..._validation import Range, check_counts
from ..._version import __version__
from ...attacks import frozen
from ...attacks.arguments import check_labels
from ...attacks.context import TimeIsOver
from ...ops import kernels_now
from ...protocols import Classifier
from ...speed.memory import BatchLimit
from ...speed.precision import whole_float32_by_default
from ...speed.reading import reading
from ..request.deadline import ASKED, device_of
from ..request.preparation import collect, note_of_modes
from ..run.attack_run import Shards
from ..run.cache import RowCache
from .certificates import LARGEST, MOST, NORMAL, Certificates, leads, looks, spent
from .counted import Counted, DependentDrawsError, Draws

#: Counts the classes of images at some places after a number of draws; the draws from `MOST` on choose a class.
Sample = Callable[[NDArray[np.int64], int], NDArray[np.int64]]


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
    x: Tensor,
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
        x: images ``[N, C, H, W]``, uint8 or floating point in [0, 1], a tensor or a NumPy array.
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
    images, labels, notes = collect(x, torch.zeros(len(x), dtype=torch.int64) if y is None else y)
    images, labels, device = images.cpu(), labels.cpu(), device_of(model, images)
    n, data = len(labels), digest(images, labels)
    # Draws choose the class that is tested. Until then, none is tested.
    extra = choosing if y is None or not radii else 0
    unknown = np.full(n, -1)
    result = Certificates(
        right=np.zeros(n, dtype=np.int64),
        draws=np.zeros(n, dtype=np.int64),
        sigma=sigma,
        radii=radii,
        alpha=alpha,
        refuted={0.0: np.zeros(n, dtype=np.bool_)} if radii == (0.0,) else {},
        notes=notes,
        index=np.arange(n) if index is None else torch.as_tensor(index).cpu().numpy(),
        labels=unknown if y is None else labels.numpy(),
        tested=unknown.copy() if extra else labels.numpy(),
    )
    steps = steps_of(result.sigma, result.radii, result.alpha, draws, batch_size=batch_size, choosing=choosing)
    if radii and steps[-1] < draws:
        notes.append(f"the draws end at {steps[-1]}, the last look within {draws} draws")
    with Shards(together) as shards, contextlib.ExitStack() as stack:
        notes += note_of_modes(model, name)
        generators = torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [])
        for block in (generators, without_autocast(device), frozen(model), reading(model)):
            stack.enter_context(block)
        limit = BatchLimit(int(batch_size), device)
        noisy = Draws(model, images, torch.from_numpy(result.index), sigma=result.sigma, seed=int(seed), limit=limit)
        if y is not None:
            check_labels("y", labels, noisy.classes)
        # A function has no weights.
        weights = weights_fingerprint(model) if isinstance(model, nn.Module) else ""
        version, kind = f"purify_fast {__version__}, PyTorch {torch.__version__}", type(model).__name__
        result.about.update(name=name, predicted_by=kind, precision=noisy.precision, version=version, weights=weights)
        result.about.update(seed=str(int(seed)), most_draws=str(steps[-1]), data=data)
        same = {"images": [data, result.index.tolist()], "model": [weights, noisy.classes]}
        shards.check_same(same | {"certificate": [y is None, sigma, radii, alpha, steps[-1], int(seed), choosing]})
        cache = RowCache(None if out is None or shards.rank > 0 else Path(out), kernels_now(device), revision)
        # Counts are found again for other images, so the model answers the same images in every call.
        some = torch.rand((ASKED, *images.shape[1:]), generator=torch.Generator().manual_seed(0), device="cpu")
        cache.register(name, model, some.to(device))
        stack.push(lambda kind, *_: cache.remove_written() if kind is DependentDrawsError else None)
        counted = Counted(noisy, shards, cache)
        if shards.rank > 0:
            return Certificates.from_json(shards.follow(noisy.counts))  # type: ignore[arg-type]
        open_, bar = np.ones(n, dtype=np.bool_), tqdm(desc=f"{name}: certificates", unit="draw", disable=not progress)

        def sample(at: NDArray[np.int64], last: int) -> NDArray[np.int64]:
            bar.total = bar.n + int((steps[-1] - result.draws[at]).sum())
            counts = counted.after(at, last, until)
            bar.update(int((last - result.draws[at]).sum()) if last < MOST else 0)
            return counts

        with bar, contextlib.suppress(TimeIsOver):
            _cohen(result, open_, sample, extra, steps)
        if unfinished := int((result.draws[open_] < steps[-1]).sum()):
            notes.append(f"{unfinished} of {n} images are unfinished after {seconds} seconds")
        # Draws of earlier runs took time too.
        took = counted.seconds / max(1, counted.drawn) * (result.draws.sum() + extra * n)
        result.about.update(choosing_draws=str(extra), seconds=f"{took:.1f}")
        shards.end(result.to_json)
    return result


def _cohen(result: Certificates, open_: NDArray[np.bool_], sample: Sample, n0: int, steps: Sequence[int]) -> None:
    """Run algorithm CERTIFY of Cohen et al. (section 3.2) on all images at once.

    The n draws, which are the last of ``steps``, are counted in steps, so that a run may end after each of them and go
    on. With radii, the draws of an image end when these are answered. ``open_`` has the images whose draws go on.
    """
    if n0:
        # The last column of counts has predictions without a class.
        counts0 = sample(np.arange(len(open_)), MOST + n0)[:, :-1]
        result.tested[:] = counts0.argmax(1)
    for n in steps:
        at = np.flatnonzero(open_)
        counts = sample(at, n)
        result.right[at], result.draws[at] = counts[np.arange(len(at)), result.tested[at]], n
        if result.radii:
            open_[at] = ~_answered(result, at, counts)
    if not result.radii:
        # `Certificates` computes the lower bound of p_A from these, and the radius, or abstains.
        result.decided[:, 0] = np.stack([result.right, result.draws], -1)


def _answered(result: Certificates, at: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Look at the draws of images at some places, whose counts by class are given. Return those that end, bool ``[n]``.

    An answer stays: later looks do not change it.
    """
    now, before = np.stack([result.right[at], result.draws[at]], -1), result.decided[at]
    done = result.answers()[at] != 0
    result.decided[at] = np.where(done[..., None], before, now[:, None])
    answer = result.answers()[at]
    if result.radii != (0.0,):
        return (answer != 0).all(1)
    # Radius 0 alone asks which class is the most frequent, which may have less than half of the draws.
    rivals = np.where(np.arange(counts.shape[1]) == result.tested[at, None], -1, counts).max(1)
    lead = leads(now[:, 0], rivals, counts.shape[1] - 1, result.alpha)
    result.refuted[0.0][at] = lead == -1
    return (answer[:, 0] == 1) | (lead != 0)
