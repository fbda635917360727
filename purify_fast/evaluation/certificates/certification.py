"""Certifies images by randomized smoothing (Cohen, Rosenfeld & Kolter, ICML 2019, arXiv 1902.02918).

The smoothed classifier of a model f predicts the class that f gives to x + n, n ~ N(0, sigma^2 I), with a probability
above 1/2; if there is none, it predicts no class. If f gives the class y to x + n with a probability above
Phi(r / sigma), then the smoothed classifier predicts y for every image at an L2 distance of at most r from x (theorem
1, with all other classes together as the second class). The probability is bounded by a confidence sequence
(`sequences`), so an image gets only the draws that its question needs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..._tensors import digest, weights_fingerprint
from ..._validation import Range, check_folder, check_number
from ...attacks import frozen
from ...attacks.arguments import check_labels
from ...ops import kernels_now
from ...protocols import Classifier
from ...speed.followed import read_copies
from ...speed.precision import whole_float32_by_default
from ..request.fingerprint import fingerprint
from ..request.preparation import collect, note_of_modes
from ..request.subject import device_of
from ..run.cache import RowCache
from ..run.shards import Shards
from .certificates import NORMAL, Certificates
from .noisy_draws import GROUP, MOST, TRIED, Draws, copy_of
from .sequences import answers, bounds, looks

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
    began = time.perf_counter()
    with (
        Shards(together) as shards,
        torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []),
        torch.no_grad(),
        contextlib.ExitStack() as stack,
    ):
        notes += note_of_modes(model, name)
        stack.enter_context(frozen(model))
        read_copies(model)
        used = copy_of(model, images[:TRIED].to(device))
        asked = Draws(used, images, labels, sigma=sigma, device=device, batch_size=int(batch_size), seed=int(seed))
        check_labels("y", labels, asked.classes)
        mark, empty, data = fingerprint(model, revision), np.zeros(len(labels), dtype=np.int64), digest(images, labels)
        whole = Certificates(empty, empty.copy(), sigma=float(sigma), radii=radii, alpha=float(alpha), notes=notes)
        whole.about.update(name=name, seed=str(int(seed)), most_draws=str(draws), data=data)
        # A function has no weights.
        whole.about["weights"] = weights_fingerprint(model) if isinstance(model, nn.Module) else ""
        settings: dict[str, Any] = {"certificate": [float(sigma), radii, float(alpha), int(draws), int(seed)]}
        shards.check_same({"images": data, "model": [mark, asked.classes], **settings})

        def decide(group: int) -> dict[str, Tensor]:
            index = torch.arange(group * GROUP, min((group + 1) * GROUP, len(labels)), device="cpu")
            return _decide(asked, whole, index, int(draws))

        if shards.rank > 0:
            return Certificates.from_json(shards.follow(decide))
        if out is not None and mark is None:
            why = "because it is a function, or holds a value that cannot be compared"
            logger.warning('out: the rows of %s are not kept, %s. certify(..., revision="1") keeps them', name, why)
        cache = RowCache(None if out is None else Path(out), kernels_now(device), revision)
        cache.register(model, mark)
        made: dict[int, dict[str, Tensor]] = {}
        groups = range(-(-len(labels) // GROUP))

        def make(group: int) -> dict[str, Tensor]:
            # Every process decides one of the next groups.
            if group not in made:
                following = groups[group : group + shards.world]
                made.update(zip(following, shards.share(following, decide), strict=True))
            return made[group]

        with tqdm(total=len(labels), desc=f"{name}: certificates", unit="image", disable=not progress) as bar:
            for group in groups:
                part = slice(group * GROUP, (group + 1) * GROUP)
                key = cache.key({**settings, "group": group, "data": digest(images[part], labels[part])}, model)
                known = cache.values(key, lambda group=group: make(group))  # type: ignore[misc]
                whole.right[part], whole.draws[part] = known["right"], known["draws"]
                bar.update(len(known["right"]))
        asked.check_unchanged()
        whole.about["seconds"] = f"{time.perf_counter() - began:.1f}"
        shards.end(whole.to_json)
    return whole


def _decide(asked: Draws, whole: Certificates, index: Tensor, most: int) -> dict[str, Tensor]:
    """Draw until each image of a group is decided: the numbers of right predictions and of draws, int64 ``[n]``."""
    right = np.zeros(len(index), dtype=np.int64)
    draws, open_ = right.copy(), np.ones(len(index), dtype=bool)
    for first, last in pairwise((0, *looks(most))):
        right[open_] += asked.right(index[torch.from_numpy(open_)], first, last)
        draws[open_] = last
        decided = [
            answers(right.astype(float), draws.astype(float), each, whole.alpha) != 0 for each in whole.thresholds
        ]
        open_ = ~np.logical_and.reduce(decided)
        if not open_.any():
            break
    return {"right": torch.from_numpy(right), "draws": torch.from_numpy(draws)}


def check_settings(sigma: Any, radius: Any, alpha: Any, **whole: Any) -> tuple[float, ...]:
    """Refuse settings of certificates that are not allowed, with TypeError or ValueError. Return the radii.

    ``whole`` are the whole numbers ``draws``, ``batch_size``, ``seed`` and perhaps ``votes``.
    """
    given = radius.tolist() if isinstance(radius, (np.ndarray, Tensor)) else radius
    radii = tuple(given) if isinstance(given, (list, tuple, range)) else (given,)
    if not radii:
        raise ValueError("radius must be a number or at least one number, got none")
    for name, value in (("sigma", sigma), ("alpha", alpha), *(("radius", each) for each in radii)):
        check_number(name, value)
    Range(0, above=True, below=True).check("sigma", sigma)
    Range(0, 1, above=True, below=True).check("alpha", alpha)
    allowed = {"draws": Range(1, MOST), "seed": Range(0, 2**31, below=True)}
    for name, value in whole.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        allowed.get(name, Range(1)).check(name, value)
    lower, _ = bounds(np.array([whole["draws"]]), np.array([whole["draws"]]), float(alpha))
    most = float(sigma) * NORMAL.inv_cdf(max(float(lower[0]), 0.5))
    for each in radii:
        Range(0, below=True).check("radius", each)
        if each > most:
            text = f"{whole['draws']} right draws at sigma {sigma:g} and alpha {alpha:g} prove, got {each}"
            raise ValueError(f"radius must be at most {most:.4g}, which {text}")
    return tuple(map(float, radii))
