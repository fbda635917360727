"""Estimates of shares: standard errors over images and draws, exact intervals, and binomial probabilities."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
#: Numbers of draws, as whole numbers or as float64.
Numbers = NDArray[Any]

#: A claim is refuted if the measured accuracy would be too improbable under it: if the claim were true, an accuracy of
#: at most the measured accuracy would have a probability below this number.
REFUTED = 0.01
#: A row shows that images share draws if its mean square over draws exceeds that of the rest at this level of
#: significance.
SHARED = 0.01
#: SciPy's bounds have at most this relative error.
EXACT = 1e-13


class Estimate(NamedTuple):
    """An accuracy with its standard error, the degrees of freedom of the error, and whether images share draws."""

    mean: float
    error: float
    freedom: float
    shared: bool

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of an accuracy between 0 and 1, by the t distribution of the logarithm of its odds.

        Near 0 and 1, accuracies are skewed, and their odds are less so.
        """
        odds = special.logit(self.mean)
        half = float(special.stdtrit(self.freedom, 0.975)) * self.error / (self.mean * (1 - self.mean))
        # With less than one degree of freedom, half is so large that its exponential would overflow.
        return float(special.expit(odds - half)), float(special.expit(odds + half))

    @classmethod
    def of(cls, right: np.ndarray) -> Estimate:
        """Estimate the mean of ``right [K, n]``, in which K draws and n images are random samples.

        These are the components of variance of a two-way table without repetition, with the degrees of freedom of
        Satterthwaite (Biometrics Bulletin 1946). Whether a model draws for each image, once for all images of a call,
        or both, need not be known.
        """
        k, n = right.shape
        values = right.astype(np.float64)
        mean, of_images, of_draws = values.mean(), values.mean(0), values.mean(1)
        rest = values - of_images - of_draws[:, None] + mean
        freedom = max(1, n - 1), max(1, k - 1), max(1, n - 1) * max(1, k - 1)
        sums = k * np.square(of_images - mean).sum(), n * np.square(of_draws - mean).sum(), np.square(rest).sum()
        images, draws, residual = (total / free for total, free in zip(sums, freedom, strict=True))
        squares = np.array([images, draws, -residual]) if draws > residual else np.array([images, 0.0, 0.0])
        total = float(squares.sum())
        spread = float((np.square(squares) / freedom).sum())
        free = total**2 / spread if spread else float(freedom[0])
        # Wilson and Hilferty's quantile of the chi-squared distribution; the rest has many degrees of freedom.
        ninth = 2 / (9 * freedom[1])
        limit = (1 - ninth + statistics.NormalDist().inv_cdf(1 - SHARED) * math.sqrt(ninth)) ** 3
        return cls(float(mean), math.sqrt(max(0.0, total) / (n * k)), free, bool(draws > limit * residual))


def lower_bounds(counts: Numbers, alpha: float) -> Floats:
    """The lower Clopper-Pearson bounds: the largest p at which so many right draws have the probability ``alpha``.

    Each is right for a number of draws that was fixed before, except with the probability ``alpha``, and is rounded
    down. ``counts`` has right draws and draws, ``[..., 2]``. Without right draws, a bound is 0.
    """
    right, draws = np.moveaxis(np.maximum(counts, 1).astype(np.float64), -1, 0)
    return np.where(counts[..., 0] > 0, special.betaincinv(right, draws - right + 1, alpha) * (1 - EXACT), 0.0)


def exact_interval(right: int, count: int) -> tuple[float, float]:
    """The exact 95 % interval of a share (Clopper-Pearson), from 0 to 1."""
    below, above = lower_bounds(np.array([[right, count], [count - right, count]]), 0.025).tolist()
    return below, 1 - above


def in_percent(share: float, interval: tuple[float, float] | None) -> str:
    """A share in percent, such as ``50.0 (35.0 to 65.0)``."""
    within = "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    return f"{100 * share:.1f}{within}"


def binomial(draws: int, share: float) -> np.ndarray:
    """The probabilities of 0 to ``draws`` successes if each has the probability ``share`` in [0, 1], float64."""
    k = torch.arange(draws + 1, dtype=torch.float64, device="cpu")
    n = k[-1]
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    mass = (ways + torch.xlogy(k, share) + torch.special.xlog1py(n - k, -share)).exp()
    return np.asarray((mass / mass.sum()).numpy(), dtype=np.float64)


def chance_of_at_most(left: int, images: int, share: float) -> float:
    """Return the probability that at most ``left`` images are robust, by the exact binomial distribution."""
    return float(binomial(images, share)[: left + 1].sum())
