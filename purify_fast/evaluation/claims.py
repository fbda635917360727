"""Test whether a claim of robust accuracy survives an evaluation."""

from __future__ import annotations

import math
from typing import Any

from .rows import Row

#: A claim is refuted if, were it true, a number this low would have a smaller chance than this.
REFUTED = 0.01
#: The largest number of images that is ever asked for.
MOST = 10**6


def check_claim(claim: Any) -> None:
    """Check a claim as `evaluate` takes it.

    Args:
        claim: robust accuracy in percent; None: no claim.

    Raises:
        TypeError: claim is not a number.
        ValueError: claim is outside 0 to 100.
    """
    if claim is None:
        return
    if isinstance(claim, bool) or not isinstance(claim, (int, float)):
        raise TypeError(f"claim must be a number of percent from 0 to 100, got {claim!r}: such as claim=70")
    if not 0 <= claim <= 100:
        raise ValueError(f"claim must be from 0 to 100, got {claim!r}: give percent of robust accuracy, such as 70")


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


def answer(claim: float, row: Row) -> str:
    """A sentence that says whether the images left refute a claim.

    Args:
        claim: robust accuracy in percent.
        row: the lowest row.
    """
    claimed, left = claim / 100, int(row.robust.sum())
    chance = chance_of_at_most(left, row.n, claimed)
    words = f"{chance:.2g}" if chance >= 1e-6 else "less than 1 in a million"
    text = (
        f"if the claim were true, at most {left} of {row.n} images would be left with a chance of {words} (exact "
        "binomial tail)"
    )
    name = f"claim of {100 * claimed:g} % robust accuracy"
    if chance < REFUTED:
        return f"{name}: refuted; {text}."
    more = images_to_decide(row.accuracy, claimed)
    share = f"if {100 * row.accuracy:.1f} % were left of more images"
    none = "no number" if row.accuracy >= claimed else "only more than a million"
    need = f"{share}, {none} of them would refute it"
    need = need if more is None else f"{share}, about {more:,} of them would refute it"
    return f"{name}: not refuted, which does not prove it; {text}; {need}."
