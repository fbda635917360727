"""A confidence sequence for a probability: intervals that are valid at every number of draws at the same time.

After n independent draws of which k are successes, the interval has every probability p with

    E(p) = B(k + 1/2, n - k + 1/2) / B(1/2, 1/2) / (p^k (1 - p)^(n - k)) < 1 / alpha

E(p) is the mean of likelihood ratios against p, over a Beta(1/2, 1/2) distribution of the alternative (Robbins, Annals
of Mathematical Statistics 41, 1970). For the true p it is a martingale that begins with 1, so it ever reaches 1 / alpha
with a probability of at most alpha (Ville, 1939). The draws may therefore stop at any moment, for any reason. Voracek
(NeurIPS 2024, arXiv 2406.17830) uses confidence sequences for randomized smoothing.

An interval at a later look may contain a probability that an earlier interval has excluded. Both are right with the
same probability, because all intervals contain the true p at the same time. So an answer that was given stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: Numbers of draws, as whole numbers or as float64.
Numbers = NDArray[Any]

#: Each look has this many times as many draws as the look before it. The draws of a look are a multiple of `STEP`.
GROWTH, STEP = 1.25, 8
#: The largest number of draws of an image, and the limit of the indices of images. The names of a random model's draws
#: are whole numbers of 32 bits.
MOST, LARGEST = 2**27, 2**31
#: Halvings of the unit interval, after which a bound is as exact as float64.
HALVINGS = 60


def looks(most: int) -> Iterator[int]:
    """The numbers of draws after which the intervals are looked at, up to ``most``."""
    count = 3 * STEP
    while count < most:
        yield count
        count = max(count + STEP, STEP * int(GROWTH * count / STEP))
    yield most


def log_evidence(right: Numbers, draws: Numbers, probability: Floats | float) -> Floats:
    """The logarithm of the evidence E against a probability in [0, 1], from counts of successes and of draws."""
    wrong = draws - right
    a, b, n = (torch.from_numpy(np.atleast_1d(each)) for each in (right + 0.5, wrong + 0.5, draws + 1.0))
    mixed = (torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(n)).numpy() - np.log(np.pi)
    p = np.asarray(probability, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        # 0 log 0 is 0.
        alone = np.where(right > 0, right * np.log(p), 0.0) + np.where(wrong > 0, wrong * np.log1p(-p), 0.0)
    return np.asarray(mixed - alone, dtype=np.float64)


def answers(right: Numbers, draws: Numbers, probability: float, alpha: float) -> NDArray[np.int8]:
    """Compare the true probabilities with ``probability``: 1 above it, -1 below it, 0 if this is not known yet."""
    known = log_evidence(right, draws, probability) >= -np.log(alpha)
    side = np.sign(right - probability * draws)
    return np.where(known, side, 0).astype(np.int8)


def leads(right: Numbers, rivals: Numbers, classes: int, alpha: float) -> NDArray[np.int8]:
    """Compare the label with all other classes: -1 if another class is more frequent, 1 if the label is, 0 if open.

    Among the draws with the label or with one other class, the share of the other class is compared with 1/2. -1 is
    wrong with a probability of at most ``alpha``: each of the other classes gets an equal part of it.

    Args:
        right: draws with the label, ``[N]``.
        rivals: draws with the most frequent other class, ``[N]``. Its evidence is the largest of all other classes.
        classes: number of the other classes.
        alpha: the largest probability of a wrong -1, in (0, 1).
    """
    return -answers(rivals, rivals + right, 0.5, alpha / classes)


def most_wrong(images: int, alpha: float) -> int:
    """The most certificates that are wrong, except with the probability alpha, if each is wrong with at most alpha.

    The draws of images are independent, so the number of wrong certificates is at most binomial.
    """
    k, n = torch.arange(images + 1, dtype=torch.float64, device="cpu"), torch.tensor(float(images), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    mass = (ways + k * np.log(alpha) + (n - k) * np.log1p(-alpha)).exp()
    # The probability of more than k wrong certificates. The sum begins with the smallest terms, and is exact to 1e-12.
    return int((mass.flip(0).cumsum(0).flip(0)[1:] > alpha * (1 + 1e-9)).sum())


def bounds(right: Numbers, draws: Numbers, alpha: float) -> tuple[Floats, Floats]:
    """The ends of the intervals, each rounded outwards: ``(lower, upper)``, float64 ``[N]``."""
    share, limit = right / np.maximum(draws, 1), -np.log(alpha)

    def end(outside: Floats) -> Floats:
        # E(p) grows from the observed share towards both ends.
        inside = share.copy()
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            excluded = log_evidence(right, draws, middle) >= limit
            inside, outside = np.where(excluded, inside, middle), np.where(excluded, middle, outside)
        return outside

    return end(np.zeros_like(share)), end(np.ones_like(share))
