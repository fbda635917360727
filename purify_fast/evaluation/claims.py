"""Test whether a claim of robust accuracy survives an evaluation."""

from __future__ import annotations

import math

#: A claim is refuted if an accuracy as low as the measured one would have a smaller probability than this, given that
#: the claim is true.
REFUTED = 0.01
#: A report never asks for more images than this to decide about a claim.
MOST = 10**6


def chance_of_at_most(left: int, images: int, share: float) -> float:
    """The exact binomial tail: the chance that at most this number of images is left.

    Args:
        left: largest number that is left, from 0 to ``images``.
        images: number of images drawn.
        share: chance of each image to be left, in [0, 1].
    """
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
    """The number of images that would refute a claim, if the same share of them were left.

    Args:
        left: the share that is left, in [0, 1].
        claim: the share that is claimed, in [0, 1].

    Returns:
        The number; None if no number would, or more than a million.
    """
    if left >= claim:
        return None
    most = 1
    while chance_of_at_most(math.floor(left * most), most, claim) >= REFUTED:
        most *= 2
        if most > MOST:
            return None
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        if chance_of_at_most(math.floor(left * middle), middle, claim) < REFUTED:
            most = middle
        else:
            least = middle
    return most
