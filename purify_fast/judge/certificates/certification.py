"""Certifies images by randomized smoothing (Cohen, Rosenfeld & Kolter, ICML 2019, arXiv 1902.02918).

The smoothed classifier of a model f predicts the class that f gives most often to x + n, n ~ N(0, sigma^2 I). If f
gives the class y to x + n with a probability above Phi(r / sigma), then the smoothed classifier predicts y for every
image at an L2 distance of at most r from x (theorem 1, with all other classes together as the second class). The draws
are counted in a table (`counted`), and `sequences` makes answers of counts.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ..._hashes import digest, weights_fingerprint
from ..._places import check_folder
from ..._settings import without_autocast
from ..._validation import Range, check_number
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
from .certificates import LARGEST, MOST, Certificates, distances, leads, looks, lower_bounds, spent
from .counted import Counted, DependentDrawsError, Draws

#: The most looks at a largest radius, of which each has about twice as many draws as the look before it.
ENDS, TWICE = 4, 6


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
    gain: float = 0.0,
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
            look is after the largest of the numbers of `sequences.looks` up to it, and then an image is undecided at
            the radii that are open.
        alpha: the largest probability that an image gets a wrong certificate, for all its radii together, in (0, 1).
        choosing: number of draws that choose the class, and count for nothing else.
        gain: without ``radius``: the draws of an image end at one of up to 4 looks if all ``draws`` can increase its
            radius by at most this share, in [0, 1), as far as an upper bound for its probability shows. The looks
            share ``alpha``. 0: a single look after all draws.
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
        TypeError: the model cannot be called, or an argument has a wrong type.
    """
    if not callable(model) or isinstance(model, type):
        raise TypeError(f"model must be a module or a function from images to logits, got {model!r}")
    check_folder("out", out)
    radii = () if radius is None else tuple(np.atleast_1d(radius).tolist())
    if not radii and radius is not None:
        raise ValueError("radius must be a number or at least one number, got none")
    numbers: dict[str, Any] = {"draws": draws, "batch_size": batch_size, "seed": seed, "choosing": choosing}
    numbers |= {"gain": gain, "seconds": seconds}
    check_settings(sigma, radii, alpha, **numbers)
    until = time.monotonic() + seconds
    images, labels, notes = collect(x, torch.zeros(len(x), dtype=torch.int64) if y is None else y)
    images, labels, device = images.cpu(), labels.cpu(), device_of(model, images)
    n, data = len(labels), digest(images, labels)
    # The counts are kept at all these numbers of draws. An image's draws may end at some of them.
    cuts = looks(draws) if radii else sorted({*looks(draws), int(draws)})
    ends = cuts if radii else cuts[::-TWICE][:ENDS] if gain else cuts[-1:]
    right, drawn = np.zeros((2, n), dtype=np.int64)
    about: dict[str, Any] = {"notes": notes, "looks": 1 if radii else len(ends)}
    about["index"] = None if index is None else torch.as_tensor(index).cpu().numpy()
    about["labels"] = None if y is None else labels.numpy()
    about["refuted"] = {0.0: np.zeros(n, dtype=np.bool_)} if radii == (0.0,) else {}
    whole = Certificates(right, drawn, float(sigma), tuple(map(float, radii)), float(alpha), **about)
    if radii and cuts[-1] < draws:
        notes.append(f"the draws end at {cuts[-1]}, the last look within {draws} draws")
    with Shards(together) as shards, contextlib.ExitStack() as stack:
        notes += note_of_modes(model, name)
        generators = torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [])
        for block in (generators, without_autocast(device), frozen(model), reading(model)):
            stack.enter_context(block)
        limit = BatchLimit(int(batch_size), device)
        noisy = Draws(model, images, torch.from_numpy(whole.index), sigma=whole.sigma, seed=int(seed), limit=limit)
        if y is not None:
            check_labels("y", labels, noisy.classes)
        # A function has no weights.
        weights = weights_fingerprint(model) if isinstance(model, nn.Module) else ""
        version, kind = f"purify_fast {__version__}, PyTorch {torch.__version__}", type(model).__name__
        whole.about.update(name=name, predicted_by=kind, precision=noisy.precision, version=version, weights=weights)
        whole.about.update(seed=str(int(seed)), most_draws=str(cuts[-1]), data=data)
        asked = [whole.sigma, radii, whole.alpha, y is None, numbers]
        same = {"images": [data, whole.index.tolist()], "model": [weights, noisy.classes], "certificate": asked}
        shards.check_same(same)
        cache = RowCache(None if out is None or shards.rank > 0 else Path(out), kernels_now(device), revision)
        # Counts are found again for other images, so the model answers the same images in every call.
        some = torch.rand((ASKED, *images.shape[1:]), generator=torch.Generator().manual_seed(0), device="cpu")
        cache.register(name, model, some.to(device))
        stack.push(lambda kind, *_: cache.remove_written() if kind is DependentDrawsError else None)
        counted = Counted(noisy, shards, cache)
        if shards.rank > 0:
            return Certificates.from_json(shards.follow(noisy.counts))  # type: ignore[arg-type]
        extra = int(choosing) if y is None or not radii else 0
        open_ = np.arange(n)
        if extra:
            # Until the class is chosen, none is tested.
            whole.tested[:] = -1
        bar = tqdm(total=n * cuts[-1], desc=f"{name}: certificates", unit="draw", disable=not progress)
        with bar, contextlib.suppress(TimeIsOver):
            if extra:
                whole.tested[:] = counted.after(open_, MOST + extra, until)[:, :-1].argmax(1)
            for last in cuts:
                counts = counted.after(open_, last, until)
                bar.update(int((last - drawn[open_]).sum()))
                right[open_], drawn[open_] = counts[np.arange(len(open_)), whole.tested[open_]], last
                if last in ends:
                    known = _ended(whole, open_, counts, gain)
                    bar.total -= int(known.sum()) * (cuts[-1] - last)
                    open_ = open_[~known]
        if unfinished := int((drawn[open_] < cuts[-1]).sum()):
            notes.append(f"{unfinished} of {n} images are unfinished after {seconds} seconds")
        # Draws of earlier runs took time too.
        took = counted.seconds / max(1, counted.drawn) * (drawn.sum() + extra * n)
        whole.about.update(choosing_draws=str(extra), seconds=f"{took:.1f}")
        shards.end(whole.to_json)
    return whole


def _ended(whole: Certificates, at: NDArray[np.int64], counts: NDArray[np.int64], gain: float) -> NDArray[np.bool_]:
    """Look at the draws of images at some places, whose counts by class are given. Return those that end, bool ``[n]``.

    The look is kept if it proves what no earlier look does.
    """
    now, before = np.stack([whole.right[at], whole.draws[at]], -1), whole.decided[at]
    if not whole.radii:
        earlier = whole.reached()[at]
        whole.decided[at] = now[:, None]
        reached = whole.reached()[at]
        whole.decided[at] = np.where((reached >= earlier)[:, None, None], now[:, None], before)
        level = whole.alpha / whole.looks
        above = 1 - lower_bounds(np.stack([now[:, 1] - now[:, 0], now[:, 1]], -1), level)
        best = whole.sigma * distances(np.minimum(above, level ** (1 / int(whole.about["most_draws"]))))
        return best <= np.maximum(0, (1 + gain) * np.maximum(reached, earlier))
    # An answer stays.
    done = whole.answers()[at] != 0
    whole.decided[at] = np.where(done[..., None], before, now[:, None])
    answer = whole.answers()[at]
    if whole.radii != (0.0,):
        return (answer != 0).all(1)
    # Radius 0 alone asks which class is the most frequent, which may have less than half of the draws.
    rivals = np.where(np.arange(counts.shape[1]) == whole.tested[at, None], -1, counts).max(1)
    lead = leads(now[:, 0], rivals, counts.shape[1] - 1, whole.alpha)
    whole.refuted[0.0][at] = lead == -1
    return (answer[:, 0] == 1) | (lead != 0)


def check_settings(sigma: Any, radii: tuple[Any, ...], alpha: Any, **numbers: Any) -> None:
    """Refuse settings of certificates that are not allowed, with TypeError or ValueError.

    ``numbers`` are the whole numbers ``draws``, ``batch_size``, ``seed`` and perhaps ``choosing`` or ``votes``, and
    perhaps ``gain`` and ``seconds``.
    """
    # Certificates without draws check the first settings.
    none = Certificates(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), sigma, radii, alpha)
    radius = max(radii, default=0.0)
    p = none.threshold(radius)

    # Right draws alone prove a probability above p if p^draws is at most the alpha that may be spent.
    def proves(n: int) -> bool:
        return p < 1 and p**n <= (spent(n, p, alpha) if radii else alpha)

    least = next((n for n in (looks(MOST) if radii else range(1, MOST)) if proves(n)), MOST)
    what = f" to prove the radius {radius} at sigma {sigma} and alpha {alpha}"
    if least == MOST:
        raise ValueError(f"radius must be smaller: fewer than {MOST} draws are needed{what}")
    allowed = {"draws": Range(least, MOST, below=True, unit=what), "seed": Range(0, LARGEST, below=True)}
    allowed |= {"choosing": Range(1, MOST), "gain": Range(0, 1, below=True), "seconds": Range(0, above=True)}
    for name, value in numbers.items():
        check_number(name, value)
        if name not in ("gain", "seconds") and not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        allowed.get(name, Range(1)).check(name, value)
    if radii and numbers.get("gain"):
        raise ValueError(f"gain is only for the largest radius, got gain {numbers['gain']} and radius {radii}")
