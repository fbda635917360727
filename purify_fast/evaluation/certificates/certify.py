"""Certifies images by randomized smoothing (Cohen, Rosenfeld & Kolter, ICML 2019, arXiv 1902.02918).

The smoothed classifier of a model f predicts the class that f gives to most of the images x + n, n ~ N(0, sigma^2 I).
If f gives the class y to x + n with a probability above Phi(r / sigma), then the smoothed classifier predicts y for
every image at an L2 distance of at most r from x (theorem 1, with all other classes together as the second class). The
probability is bounded by a confidence sequence (`sequences`), so an image gets only the draws that its question needs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..._tensors import digest
from ..._validation import Range, check_counts, check_folder, check_number
from ...attacks import frozen
from ...attacks.arguments import check_labels
from ...ops import kernels_now
from ...protocols import Classifier
from ...speed.precision import whole_float32_by_default
from ..request.fingerprint import fingerprint
from ..request.preparation import collect
from ..request.subject import device_of
from ..run.cache import RowCache
from ..run.shards import Shards
from .certificates import Certificates
from .draws import GROUP, MOST, Draws, copy_of
from .sequences import answers, looks

#: The number of groups whose counts are kept together, and that processes share.
SHARED = 8

logger = logging.getLogger("purify_fast")


@whole_float32_by_default()
@torch.inference_mode(False)
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
    out: str | Path | None = None,
    name: str = "model",
    revision: str | None = None,
    progress: bool = True,
    together: bool = True,
) -> Certificates:
    """Certify that the smoothed classifier of a model predicts the labels within L2 balls around images.

    Noisy images are not clamped to [0, 1]. The frozen copy of a module predicts, in float32. Draws are tied to the
    seed, the image's index and the draw's index, so the certificates do not depend on ``batch_size``, on the number of
    processes, or on interruptions, except where rounding moves a logit across a tie.

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
        batch_size: largest number of noisy images in a forward pass. It is halved when memory runs out.
        seed: seed of the noise, in [0, 2^31).
        out: a folder. Finished groups of 32 images are cached in ``out/rows``, as rows of `evaluate` are.
        name: name of the model in the report.
        revision: a name for the model's code, as in `evaluate`.
        progress: whether to show a progress bar, in images.
        together: whether the processes of torch's default process group share the work.

    Returns:
        `Certificates`; every process returns the same.

    Raises:
        ValueError: a wrong shape, dtype, range or setting; the model is random without draws for each image; or an
            image's logits depend on the other images of its batch.
        TypeError: the model cannot be called, or an argument has a wrong type.
    """
    if not callable(model) or isinstance(model, type):
        raise TypeError(f"model must be a module or a function from images to logits, got {model!r}")
    radii = tuple(float(each) for each in (radius if isinstance(radius, (list, tuple)) else [radius]))
    check_settings(sigma, radii, alpha, seed)
    check_counts(draws=draws, batch_size=batch_size)
    if draws > MOST:
        raise ValueError(f"draws must be at most {MOST}, got {draws}")
    check_folder("out", out)
    images, labels, notes = collect(x, y)
    images, labels, device = images.cpu(), labels.cpu(), device_of(model, images)
    began = time.perf_counter()
    with (
        Shards(together) as shards,
        torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []),
        torch.no_grad(),
        frozen(model),
    ):
        asked = Draws(
            copy_of(model, images.to(device)),
            images,
            labels,
            sigma=sigma,
            device=device,
            batch_size=batch_size,
            seed=seed,
        )
        check_labels("y", labels, asked.classes)
        mark = fingerprint(model, revision)
        empty = np.zeros(len(labels), dtype=np.int64)
        whole = Certificates(empty, empty.copy(), sigma=float(sigma), radii=radii, alpha=float(alpha), notes=notes)
        whole.about.update(name=name, seed=str(seed), most_draws=str(draws))
        settings: dict[str, Any] = {"certificate": [float(sigma), radii, float(alpha), draws, seed]}
        shards.check_same({"images": digest(images, labels), "model": [mark, asked.classes], **settings})

        def decide(group: int) -> tuple[Any, Any]:
            index = torch.arange(group * GROUP, min((group + 1) * GROUP, len(labels)), device="cpu")
            return _decide(asked, whole, index, draws)

        if shards.rank > 0:
            return Certificates.from_json(shards.follow(decide))
        if out is not None and mark is None:
            why = "because it is a function, or holds a value that cannot be compared"
            logger.warning('out: the rows of %s are not kept, %s. certify(..., revision="1") keeps them', name, why)
        cache = RowCache(None if out is None else Path(out), kernels_now(device), revision)
        cache.register(model, mark)
        with tqdm(total=len(labels), desc=f"{name}: certificates", unit="image", disable=not progress) as bar:
            for start in range(0, len(labels), GROUP * SHARED):
                part = slice(start, min(start + GROUP * SHARED, len(labels)))
                groups = range(start // GROUP, -(-part.stop // GROUP))

                def make(groups: range = groups) -> dict[str, Any]:
                    pairs = zip(*shards.share(groups, decide), strict=True)
                    return {name: torch.cat(parts) for name, parts in zip(("right", "draws"), pairs, strict=True)}

                key = cache.key({**settings, "first": start, "data": digest(images[part], labels[part])}, model)
                known = cache.values(key, make)
                whole.right[part], whole.draws[part] = known["right"], known["draws"]
                bar.update(part.stop - start)
        whole.about["seconds"] = f"{time.perf_counter() - began:.1f}"
        shards.end(whole.to_json)
    return whole


def _decide(asked: Draws, whole: Certificates, index: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Draw until each image of a group is decided: the numbers of right predictions and of draws, int64 ``[n]``."""
    right = np.zeros(len(index), dtype=np.int64)
    draws, open_ = right.copy(), np.ones(len(index), dtype=bool)
    for first, last in pairwise((0, *looks(most))):
        right[open_] += asked.right(index[torch.from_numpy(open_)], first, last)
        draws[open_] = last
        decided = [answers(right, draws, each, whole.alpha) != 0 for each in whole.thresholds]
        open_ = ~np.logical_and.reduce(decided)
        if not open_.any():
            break
    return torch.from_numpy(right), torch.from_numpy(draws)


def check_settings(sigma: float, radii: Sequence[float], alpha: float, seed: int) -> None:
    """Raise a TypeError or a ValueError for a setting of a certificate that is not allowed."""
    for name, value in (("sigma", sigma), ("alpha", alpha), *(("radius", each) for each in radii)):
        check_number(name, value)
    Range(0, above=True, below=True).check("sigma", sigma)
    Range(0, 1, above=True, below=True).check("alpha", alpha)
    Range(0, 2**31, below=True).check("seed", seed)
    if not radii:
        raise ValueError("radius must be a number or at least one number, got an empty list")
    for each in radii:
        Range(0, below=True).check("radius", each)
