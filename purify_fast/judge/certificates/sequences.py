"""Bounds for a probability from counts of draws: for a fixed number of draws, and for a test that may end earlier.

The draws of a test are looked at after fixed numbers of draws, whatever its budget is. A probability p is proved to be
above a threshold at the first look with enough right draws. How many are enough, `boundary` computes: it follows the
distribution of the right draws from look to look at p = threshold, and takes the least number at which all crossings
up to this look together are no more probable than `spent` allows. So a wrong answer has a probability of at most alpha,
an answer stays whatever the later draws are, and a larger budget changes none (a group-sequential test with a spending
function, Lan & DeMets, Biometrika 70, 1983, here with exact binomial probabilities).

Each side has alpha: a probability is either at most the threshold, and then only "above" is wrong, or above it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: Numbers of draws, as whole numbers or as float64.
Numbers = NDArray[Any]

#: The numbers of draws of the looks are these times powers of ten: twenty in a decade.
DECADE = (100, 112, 125, 140, 160, 180, 200, 225, 250, 280, 320, 360, 400, 450, 500, 560, 640, 720, 800, 900)
#: The first look.
FIRST = 20
#: The largest number of draws of an image, and the limit of the indices of images. The names of a random model's draws
#: are whole numbers of 32 bits.
MOST, LARGEST = 2**27, 2**31
#: The relative error of a bound.
EXACT = 1e-13
#: A look spends alpha up to 1 - REST (c / n)^POWER of it. c draws, all right, have the probability alpha.
REST, POWER = 0.7, 0.2
#: The share of alpha that is kept back for rounding, and the largest relative probability of what is left out.
ROUNDING, NOTHING = 1e-6, 1e-20


def looks(most: int) -> list[int]:
    """The numbers of draws after which a test looks, up to ``most``."""
    numbers = (digits * 10**zeros // 100 for zeros in range(1, 10) for digits in DECADE)
    return [number for number in numbers if FIRST <= number <= most]


def spent(draws: int, threshold: float, alpha: float) -> float:
    """The probability that the looks up to a number of draws may spend on wrong answers."""
    share = math.log(alpha) / math.log(threshold) / draws
    return alpha * (1 - ROUNDING) * max(0.0, 1 - REST * share**POWER)


@functools.lru_cache(maxsize=256)
def boundary(threshold: float, alpha: float, most: int) -> tuple[int, ...]:
    """The least number of right draws, for each of `looks`, that proves a probability above a threshold in (0, 1).

    It is larger than the number of draws at a look that proves nothing.
    """
    start, mass, left, least = 0, np.ones(1), 0.0, list[int]()
    for first, last in pairwise((0, *looks(most))):
        steps = _binomial(last - first, threshold)
        kept = np.flatnonzero(steps > alpha * NOTHING)
        # The probabilities of start, start + 1, ... right draws without an answer so far.
        mass, start = np.convolve(mass, steps[kept[0] : kept[-1] + 1]), start + int(kept[0])
        beyond = np.append(mass[::-1].cumsum()[::-1], 0.0)
        enough = int(np.argmax(left + beyond <= spent(last, threshold, alpha)))
        least.append(start + enough)
        left, mass = left + float(beyond[enough]), mass[:enough]
        kept = np.flatnonzero(mass > alpha * NOTHING)
        mass, start = mass[kept[0] :], start + int(kept[0])
    return tuple(least)


def _binomial(draws: int, probability: float) -> Floats:
    """The probabilities of 0 to ``draws`` successes."""
    k, n = torch.arange(draws + 1, dtype=torch.float64, device="cpu"), torch.tensor(float(draws), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    mass = (ways + k * math.log(probability) + (n - k) * math.log1p(-probability)).exp()
    return np.asarray((mass / mass.sum()).numpy(), dtype=np.float64)


def answers(look: Numbers, thresholds: Sequence[float], alpha: float) -> NDArray[np.int8]:
    """Compare the true probabilities of images with thresholds, int8 ``[N, thresholds]``.

    1 is above a threshold, -1 is not above it, and 0 is not known at this look. The first answers of an image are all
    right together, except with the probability ``alpha`` for the 1 and as much for the -1: an image is above a
    threshold only at a look at which it is above all smaller ones, and so on.

    Args:
        look: right draws and draws at the look for each threshold, ``[N, thresholds, 2]``. The draws are numbers of
            `looks`. With 0 draws there is no answer.
        thresholds: probabilities in (0, 1).
        alpha: the largest probability of a wrong answer of a kind, in (0, 1).
    """
    right, draws = look[..., 0], look[..., 1]
    most, order = max(FIRST, int(draws.max(initial=0))), np.argsort(thresholds, kind="stable")
    at, ordered = np.array(looks(most)), [float(thresholds[place]) for place in order]
    above = np.maximum.accumulate([boundary(each, alpha, most) for each in ordered])
    below = at - np.maximum.accumulate([boundary(1 - each, alpha, most) for each in ordered[::-1]])[::-1]
    rank, place = order.argsort(), np.searchsorted(at, draws)
    found = (right >= above[rank, place]).astype(np.int8) - (right <= below[rank, place]).astype(np.int8)
    return np.where(draws > 0, found, 0).astype(np.int8)


def lower_bounds(look: Numbers, alpha: float) -> Floats:
    """The lower Clopper-Pearson bounds: the largest p at which so many right draws have the probability ``alpha``.

    Each is right for a number of draws that was fixed before, except with the probability ``alpha``, and is rounded
    down. ``look`` has right draws and draws, ``[..., 2]``. Without draws, a bound is 0.
    """
    k, n = np.moveaxis(np.maximum(look, 1).astype(np.float64), -1, 0)
    p, change = np.minimum(k / n, (k + 1) / (n + 3)), np.ones_like(k)
    # The logarithm of the probability is concave in p. So Newton's method comes to the bound from below.
    while (np.abs(change) > EXACT * p).any():
        log, slope = _log_beta(k, n - k + 1, p)
        change = np.maximum((math.log(alpha) - log) / slope, -p / 2)
        p = p + change
    return np.where(look[..., 0] > 0, p * (1 - EXACT), 0.0)


def distances(probabilities: Floats) -> Floats:
    """The radii that probabilities prove with a sigma of 1: the inverse of the normal distribution function."""
    return np.asarray(torch.special.ndtri(torch.from_numpy(np.asarray(probabilities, dtype=np.float64))).numpy())


def _log_beta(a: Floats, b: Floats, x: Floats) -> tuple[Floats, Floats]:
    """The logarithm of the regularized incomplete beta function at x in (0, 1), and its derivative by x.

    The continued fraction is 8.17.22 of the Digital Library of Mathematical Functions, by Lentz's method.
    """
    gammas = torch.lgamma(torch.from_numpy(np.stack([a + b, a, b]))).numpy()
    front = gammas[0] - gammas[1] - gammas[2] + a * np.log(x) + b * np.log1p(-x) - np.log(a)
    c, d, m = np.ones_like(x), 1 / (1 - (a + b) * x / (a + 1)), 0
    value, change = d, np.zeros_like(x)
    while (np.abs(change - 1) > EXACT).any():
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = 1 + term / c, 1 / (1 + term * d)
            change = c * d
            value = value * change
    return front + np.log(value), a / (x * (1 - x) * value)


def most_wrong(images: int, alpha: float) -> int:
    """The most certificates that are wrong, except with the probability alpha, if each is wrong with at most alpha.

    The draws of images are independent, so the number of wrong certificates is at most binomial.
    """
    # The probability of more than k wrong certificates. The sum begins with the smallest terms, and is exact to 1e-12.
    return int((_binomial(images, alpha)[::-1].cumsum()[::-1][1:] > alpha * (1 + 1e-9)).sum())


def leads(right: Numbers, rivals: Numbers, classes: int, alpha: float) -> NDArray[np.int8]:
    """Compare the label with all other classes: -1 if another class is more frequent, 1 if the label is, 0 if open.

    Among the draws with the label or with one other class, the share of the other class is compared with 1/2. The
    evidence against 1/2 is the mean of likelihood ratios over a Beta(1/2, 1/2) distribution of the alternative
    (Robbins, Annals of Mathematical Statistics 41, 1970). If 1/2 is true, it is a martingale that begins with 1, so it
    ever reaches 1 / alpha with a probability of at most alpha (Ville, 1939), at whatever draws it is looked at. -1 is
    wrong with a probability of at most ``alpha``: each of the other classes gets an equal part of it.

    Args:
        right: draws with the label, ``[N]``.
        rivals: draws with the most frequent other class, ``[N]``. Its evidence is the largest of all other classes.
        classes: number of the other classes.
        alpha: the largest probability of a wrong -1, in (0, 1).
    """
    counts = torch.from_numpy(np.stack([right, rivals]).astype(np.float64))
    both = counts.sum(0)
    mixed = torch.lgamma(counts + 0.5).sum(0) - torch.lgamma(both + 1) - math.log(math.pi)
    known = (mixed + both * math.log(2) >= math.log(classes / alpha)).numpy()
    return np.where(known, np.sign(right - rivals), 0).astype(np.int8)
