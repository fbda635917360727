"""Tests whether the result of an evaluation refutes a claimed robust accuracy."""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass
from typing import Literal

from .rows import Row

#: A claim is refuted if the measured accuracy would be too improbable under it: if the claim were true, an accuracy of
#: at most the measured accuracy would have a probability below this number.
REFUTED = 0.01
#: The largest number of images that a report names as necessary to refute a claim.
MOST = 2**20


def chance_of_at_most(left: int, images: int, share: float) -> float:
    """Return the probability that at most ``left`` images are robust, by the exact binomial distribution."""
    if left >= images or share == 0:
        return 1.0
    if share == 1:
        return 0.0
    first = math.lgamma(images + 1) + images * math.log1p(-share)
    odds = math.log(share) - math.log1p(-share)
    terms = (
        math.exp(first - math.lgamma(count + 1) - math.lgamma(images - count + 1) + count * odds)
        for count in range(left + 1)
    )
    return min(1.0, math.fsum(terms))


def images_to_decide(left: float, claim: float) -> int | None:
    """Return the number of images that would refute a claim if the measured accuracy stayed the same on them."""
    if left >= claim:
        return None

    def refutes(images: int) -> bool:
        return chance_of_at_most(math.floor(left * images), images, claim) < REFUTED

    most = 1
    while not refutes(most):
        most *= 2
        if most > MOST:
            return None
    # Half of `most` images do not refute the claim, so the smallest number that does is above this half.
    least = most // 2 + 1
    return least + bisect.bisect_left(range(least, most), True, key=refutes)


@dataclass(frozen=True)
class ClaimTest:
    """The result of the test if a row refutes a claimed robust accuracy.

    A random model is tested by the accuracy of one draw. The mean over several draws varies less than a single draw, so
    the binomial test of the rounded up number is cautious. ``chance`` is the probability of at most ``left`` robust
    images if the claim is true.
    """

    verdict: Literal["refuted", "not refuted", "not tested"]
    claim: float
    share: float
    left: int
    images: int
    chance: float

    @functools.cached_property
    def more(self) -> int | None:
        """The number of images that would refute the claim, see `images_to_decide`."""
        return images_to_decide(self.share, self.claim)


def tested_claim(claim: float, row: Row, clean: Row | None) -> ClaimTest:
    """Test a claimed robust accuracy."""
    share = row.mean
    if row.of_draws:
        # Draws that all images of a call share are not independent among the images. So the best draw is taken.
        share = min(1.0, share + max(row.of_draws) - sum(row.of_draws) / len(row.of_draws))
    left = math.ceil(share * row.n - 1e-9)
    chance = chance_of_at_most(left, row.n, claim)
    verdict: Literal["refuted", "not refuted", "not tested"] = "refuted" if chance < REFUTED else "not refuted"
    # Predictions without a class must not refute a claim, so they are also counted as right.
    nameless = math.ceil(row.nonfinite_predictions / row.n_eval)
    by_names = chance_of_at_most(min(row.n, left + nameless), row.n, claim) < REFUTED
    if row.nothing_to_attack or (clean is not None and clean.nonfinite_predictions) or by_names != (chance < REFUTED):
        verdict = "not tested"
    return ClaimTest(verdict, claim=claim, share=share, left=left, images=row.n, chance=chance)
