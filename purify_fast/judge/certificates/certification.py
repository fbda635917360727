"""Certifies images by randomized smoothing (Cohen, Rosenfeld & Kolter, ICML 2019, arXiv 1902.02918).

The smoothed classifier of a model f predicts the class that f gives most often to x + n, n ~ N(0, sigma^2 I). If f
gives the class y to x + n with a probability above Phi(r / sigma), then the smoothed classifier predicts y for every
image at an L2 distance of at most r from x (theorem 1, with all other classes together as the second class). The
probability is bounded by a confidence sequence (`sequences`), so an image gets only the draws that its question needs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ..._tensors import digest, weights_fingerprint, without_autocast
from ..._validation import Range, check_folder, check_number
from ..._version import __version__
from ...attacks import frozen
from ...attacks.arguments import check_labels
from ...ops import kernels_now
from ...protocols import Classifier
from ...speed.followed import read_copies
from ...speed.memory import BatchLimit
from ...speed.precision import whole_float32_by_default
from ..request.fingerprint import fingerprint
from ..request.preparation import collect, note_of_modes
from ..request.subject import device_of
from ..run.cache import RowCache
from ..run.shards import Shards
from .certificates import NORMAL, Certificates
from .noisy_draws import DependentDrawsError, Draws
from .sequences import LARGEST, MOST, answers, bounds, leads, looks

logger = logging.getLogger("purify_fast")


#: The number of images whose draws are made together, and of which the cache has a row.
GROUP = 32
#: Increase this number after a change of what a cached row contains.
ROWS = 2


@whole_float32_by_default()
@torch.inference_mode(False)
@torch.no_grad()
def certify(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    sigma: float,
    radius: float | Sequence[float],
    alpha: float = 0.001,
    draws: int = 100_000,
    batch_size: int = 1000,
    seed: int = 0,
    index: Tensor | Sequence[int] | None = None,
    out: str | Path | None = None,
    name: str = "model",
    revision: str | None = None,
    progress: bool = True,
    together: bool = True,
) -> Certificates:
    """Certify that the smoothed classifier of a model predicts the labels within L2 balls around images.

    Noisy images are not clamped to [0, 1]. The model itself predicts, outside of the caller's autocast; to certify its
    frozen copy, give `purify_fast.frozen_copy(model, x)`. Draws are tied to the seed, the image's index and the draw's
    index, so the certificates do not depend on ``batch_size``, on the number of processes, or on interruptions, except
    where rounding moves a logit across a tie.

    Each batch has up to 16 rows at random places whose logits are known. If they change, the run is refused, and the
    rows that it has cached are removed.

    Args:
        model: images ``[B, C, H, W]``, float32, to logits ``[B, classes]``: a deterministic module or function, or a
            random defence of this package with ``draws_for_each_image``, whose own draws count as a part of the noise.
            `purify_fast.methods.diffusion.DiffusionPurifier.one_shot` makes a model of a diffusion purifier.
        x: images ``[N, C, H, W]``, uint8 or floating point in [0, 1], a tensor or a NumPy array.
        y: labels, integers ``[N]``.
        sigma: standard deviation of the noise in image units, above 0.
        radius: L2 radius in image units, at least 0, or several radii. The draws of an image end when it is known for
            each radius whether the model's probability of the label is large enough.
        alpha: the largest probability that an image gets a wrong certificate, for all its radii together, in (0, 1).
        draws: largest number of draws for an image. An image is undecided at the radii that are open then.
        batch_size: largest number of rows in a forward pass. It is halved when memory runs out.
        seed: seed of the noise, in [0, 2^31).
        index: the images' indices in their data set, integers ``[N]`` in [0, 2^31), all different. An image then has
            the same draws among any other images. Default: 0 to N - 1.
        out: a folder. Finished groups of 32 images are cached in ``out/rows``, as rows of `evaluate` are.
        name: name of the model in the report.
        revision: a name for the model's code, as in `evaluate`.
        progress: whether to show a progress bar, in images.
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
    radii = check_settings(sigma, radius, alpha, draws=draws, batch_size=batch_size, seed=seed)
    check_folder("out", out)
    images, labels, notes = collect(x, y)
    images, labels, device = images.cpu(), labels.cpu(), device_of(model, images)
    n, data = len(labels), digest(images, labels)
    numbered = np.arange(n) if index is None else torch.as_tensor(index).cpu().numpy()
    right, drawn = np.zeros((2, n), dtype=np.int64)
    whole = Certificates(right, drawn, float(sigma), radii, float(alpha), notes=notes, index=numbered)
    began, names, beaten = time.perf_counter(), torch.from_numpy(whole.index), np.zeros(n, dtype=np.bool_)
    with Shards(together) as shards, contextlib.ExitStack() as stack:
        notes += note_of_modes(model, name)
        generators = torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [])
        for block in (generators, without_autocast(device), frozen(model)):
            stack.enter_context(block)
        read_copies(model)
        limit = BatchLimit(int(batch_size), device)
        asked = Draws(model, images, names, sigma=whole.sigma, seed=int(seed), limit=limit)
        check_labels("y", labels, asked.classes)
        mark, settings = fingerprint(model, revision), [ROWS, whole.sigma, radii, whole.alpha, int(draws), int(seed)]
        # A function has no weights.
        weights = weights_fingerprint(model) if isinstance(model, nn.Module) else ""
        version, kind = f"purify_fast {__version__}, PyTorch {torch.__version__}", type(model).__name__
        whole.about.update(name=name, predicted_by=kind, precision=asked.precision, version=version, weights=weights)
        whole.about.update(seed=str(int(seed)), most_draws=str(draws), data=data)
        shards.check_same({"images": [data, names.tolist()], "model": [mark, asked.classes], "certificate": settings})
        groups = torch.arange(n, device="cpu").split(GROUP)

        def decide(group: int) -> dict[str, Tensor]:
            return _decide(asked, whole, groups[group], labels[groups[group]].numpy(), int(draws))

        if shards.rank > 0:
            return Certificates.from_json(shards.follow(decide))
        if out is not None and mark is None:
            why = "because it is a function, or holds a value that cannot be compared"
            logger.warning('out: the rows of %s are not kept, %s. certify(..., revision="1") keeps them', name, why)
        cache = RowCache(None if out is None else Path(out), kernels_now(device), revision)
        cache.register(model, mark)
        made: dict[int, dict[str, Tensor]] = {}

        def make(group: int) -> dict[str, Tensor]:
            # Every process decides one of the next groups.
            if group not in made:
                following = range(len(groups))[group : group + shards.world]
                made.update(zip(following, shards.share(following, decide), strict=True))
            return made[group]

        stack.push(lambda kind, *_: cache.remove_written() if kind is DependentDrawsError else None)
        with tqdm(total=n, desc=f"{name}: certificates", unit="image", disable=not progress) as bar:
            for group, part in enumerate(groups):
                about = {"certificate": settings, "data": digest(images[part], labels[part], names[part])}
                known = cache.values(cache.key(about, model), lambda group=group: make(group))  # type: ignore[misc]
                right[part], drawn[part], beaten[part] = known["right"], known["draws"], known["beaten"]
                whole.decided[part] = known["decided"]
                bar.update(len(part))
        if radii == (0.0,):
            whole.refuted[0.0] = beaten
        whole.about["seconds"] = f"{time.perf_counter() - began:.1f}"
        shards.end(whole.to_json)
    return whole


def _decide(asked: Draws, whole: Certificates, part: Tensor, y: NDArray[np.int64], most: int) -> dict[str, Tensor]:
    """Draw until each image of a group is decided.

    Returns:
        ``right`` and ``draws``, int64 ``[n]``, and ``decided``, int64 ``[n, radii, 2]``, as in `Certificates`; and
        ``beaten``, bool ``[n]``: whether another class is proved to be more frequent than the label.
    """
    counts, shape = np.zeros((len(y), asked.classes + 1), dtype=np.int64), (len(y), len(whole.radii))
    now, decided, done = counts[:, :2].copy(), np.zeros((*shape, 2), dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    its_own = np.arange(len(y)), y
    for first, last in pairwise((0, *looks(most))):
        open_ = ~done.all(1)
        if not open_.any():
            break
        counts[open_] += asked.counts(part[torch.from_numpy(open_)], first, last)
        others = counts.copy()
        others[its_own] = -1
        now = np.stack([counts[its_own], counts.sum(1)], 1)
        lead = leads(now[:, 0], others.max(1), asked.classes, whole.alpha)
        decided[~done] = np.broadcast_to(now[:, None], decided.shape)[~done]
        for k, radius in enumerate(whole.radii):
            answer = answers(now[:, 0], now[:, 1], whole.threshold(radius), whole.alpha)
            # Radius 0 alone asks which class is the most frequent, which may have less than half of the draws.
            done[:, k] |= (answer == 1) | (lead != 0) if whole.radii == (0.0,) else answer != 0
    rows = {"right": now[:, 0], "draws": now[:, 1], "decided": decided, "beaten": lead == -1}
    return {name: torch.from_numpy(value.copy()) for name, value in rows.items()}


def check_settings(sigma: Any, radius: Any, alpha: Any, **whole: Any) -> tuple[float, ...]:
    """Refuse settings of certificates that are not allowed, with TypeError or ValueError. Return the radii.

    ``whole`` are the whole numbers ``draws``, ``batch_size``, ``seed`` and perhaps ``votes``.
    """
    given = radius.tolist() if isinstance(radius, (np.ndarray, Tensor)) else radius
    radii = tuple(given) if isinstance(given, (list, tuple, range)) else (given,)
    if not radii:
        raise ValueError("radius must be a number or at least one number, got none")
    allowed = {"sigma": Range(0, above=True, below=True), "alpha": Range(0, 1, above=True, below=True)}
    allowed |= {"draws": Range(1, MOST), "radius": Range(0, below=True), "seed": Range(0, LARGEST, below=True)}
    for name, value in [("sigma", sigma), ("alpha", alpha), *(("radius", each) for each in radii), *whole.items()]:
        if name in whole and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        check_number(name, value)
        allowed.get(name, Range(1)).check(name, value)
    # No alpha of float64 needs more right draws to prove a majority.
    numbers, count = np.arange(1.0, 2048.0), whole["draws"]
    Range(numbers[answers(numbers, numbers, 0.5, float(alpha)) == 1][0], MOST).check("draws", count)
    lower, _ = bounds(np.array([count]), np.array([count]), float(alpha))
    most = float(sigma) * NORMAL.inv_cdf(float(lower[0]))
    if max(radii) > most:
        text = f"{count} right draws at sigma {sigma} and alpha {alpha} prove, got {max(radii)}"
        # A bound is rounded down.
        raise ValueError(f"radius must be at most {math.floor(1e4 * most) / 1e4}, which {text}")
    return tuple(map(float, radii))
