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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ..._hashes import digest, weights_fingerprint
from ..._places import check_folder
from ..._settings import without_autocast
from ..._validation import Positive, Range, check_types
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


@dataclass(frozen=True)
class Settings:
    """The numbers of `certify`, by the names of its arguments; ``radii`` is empty for the largest radii."""

    sigma: Positive
    radii: tuple[Annotated[float, Range(0, below=True)], ...]
    alpha: Annotated[float, Range(0, 0.5, above=True)]
    draws: Annotated[int, Range(1, MOST, below=True)]
    batch_size: Annotated[int, Range(1)]
    seed: Annotated[int, Range(0, LARGEST, below=True)]
    choosing: Annotated[int, Range(1)] = 1
    seconds: Annotated[float, Range(0, above=True)] = math.inf

    def __post_init__(self) -> None:
        check_types(self)
        radius, n = max(self.radii, default=0.0), max(self.cuts, default=0)
        p = NORMAL.cdf(radius / self.sigma)
        # Right draws alone prove a probability above p if p^n is at most the alpha that may be spent.
        if not n or p == 1 or p**n > (spent(n, p, self.alpha) if self.radii else self.alpha):
            few = f"{self.draws} cannot prove the radius {radius} at sigma {self.sigma} and alpha {self.alpha}"
            raise ValueError(f"draws must be more, or radius smaller: {few}")

    @property
    def cuts(self) -> list[int]:
        """The numbers of draws after which the counts are kept: the looks, and also all draws for a largest radius."""
        return looks(self.draws) if self.radii else sorted({*looks(self.draws), self.draws})


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
    numbers: dict[str, Any] = {"draws": draws, "batch_size": batch_size, "seed": seed, "choosing": choosing}
    settings = Settings(sigma, radii, alpha, seconds=seconds, **numbers)
    until = time.monotonic() + seconds
    images, labels, notes = collect(x, torch.zeros(len(x), dtype=torch.int64) if y is None else y)
    images, labels, device = images.cpu(), labels.cpu(), device_of(model, images)
    n, data, cuts = len(labels), digest(images, labels), settings.cuts
    right, drawn = np.zeros((2, n), dtype=np.int64)
    # Draws choose the class that is tested. Until then, none is tested.
    extra = choosing if y is None or not radii else 0
    about: dict[str, Any] = {"notes": notes, "labels": None if y is None else labels.numpy()}
    about["index"] = None if index is None else torch.as_tensor(index).cpu().numpy()
    about["tested"] = np.full(n, -1) if extra else None
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
        same = {"images": [data, whole.index.tolist()], "model": [weights, noisy.classes]}
        shards.check_same(same | {"certificate": [y is None, settings]})
        cache = RowCache(None if out is None or shards.rank > 0 else Path(out), kernels_now(device), revision)
        # Counts are found again for other images, so the model answers the same images in every call.
        some = torch.rand((ASKED, *images.shape[1:]), generator=torch.Generator().manual_seed(0), device="cpu")
        cache.register(name, model, some.to(device))
        stack.push(lambda kind, *_: cache.remove_written() if kind is DependentDrawsError else None)
        counted = Counted(noisy, shards, cache)
        if shards.rank > 0:
            return Certificates.from_json(shards.follow(noisy.counts))  # type: ignore[arg-type]
        open_ = np.ones(n, dtype=np.bool_)
        bar = tqdm(total=n * cuts[-1], desc=f"{name}: certificates", unit="draw", disable=not progress)

        def sample(last: int) -> NDArray[np.int64]:
            at = np.flatnonzero(open_)
            counts = counted.after(at, last, until)
            if last < MOST:
                bar.update(int((last - drawn[at]).sum()))
                right[at], drawn[at] = counts[np.arange(len(at)), whole.tested[at]], last
            return counts

        with bar, contextlib.suppress(TimeIsOver):
            if not radii:
                _cohen(whole, sample, choosing, cuts)
            else:
                if extra:
                    whole.tested[:] = sample(MOST + choosing)[:, :-1].argmax(1)
                for last in cuts:
                    at = np.flatnonzero(open_)
                    known = _answered(whole, at, sample(last))
                    bar.total -= int(known.sum()) * (cuts[-1] - last)
                    open_[at[known]] = False
        if unfinished := int((drawn[open_] < cuts[-1]).sum()):
            notes.append(f"{unfinished} of {n} images are unfinished after {seconds} seconds")
        # Draws of earlier runs took time too.
        took = counted.seconds / max(1, counted.drawn) * (drawn.sum() + extra * n)
        whole.about.update(choosing_draws=str(extra), seconds=f"{took:.1f}")
        shards.end(whole.to_json)
    return whole


def _cohen(whole: Certificates, sample: Callable[[int], NDArray[np.int64]], n0: int, steps: Sequence[int]) -> None:
    """Run algorithm CERTIFY of Cohen et al. (section 3.2) on all images at once.

    ``sample`` counts the classes of the images' draws up to a number, or from `MOST` on. The last of ``steps`` is n.
    """
    # The last column of counts has predictions without a class.
    counts0 = sample(MOST + n0)[:, :-1]
    top = whole.tested[:] = counts0.argmax(1)
    # The n other draws are counted in steps, so that a run may end after each of them and go on.
    *_, counts = (sample(step) for step in steps)
    right, n = counts[np.arange(len(top)), top], counts.sum(1)
    # `Certificates` computes the lower bound of p_A from these, and the radius, or abstains.
    whole.decided[:, 0] = np.stack([right, n], -1)


def _answered(whole: Certificates, at: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Look at the draws of images at some places, whose counts by class are given. Return those that end, bool ``[n]``.

    An answer stays: later looks do not change it.
    """
    now, before = np.stack([whole.right[at], whole.draws[at]], -1), whole.decided[at]
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
