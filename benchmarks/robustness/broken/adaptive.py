"""Build adaptive attacks, which compute about ten times as many gradients as the protocol ``standard``.

An adaptive attack is a chain of parts, called searches. Each search attacks the images that the earlier searches did
not break. The searches aim at every wrong class from several starts, with two losses and many steps, and do not stop
early. Each step on a random model averages over many random predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from purify_fast.attacks import APGD
from purify_fast.evaluation import AttackSpec

from .entry import Entry, Search

#: On a random model, a step averages over DRAWS random predictions, or over MANY_DRAWS if predictions are fast.
DRAWS, MANY_DRAWS = 20, 40


def every_class(follows: int = 1, *, steps: int = 200, restarts: int = 2, classes: int = 9, **more: Any) -> Search:
    """Return a search towards each wrong class in turn. The loss is the margin, whose gradient does not vanish."""
    return Search(
        APGD(loss="margin_targeted", steps=steps, restarts=restarts, n_target_classes=classes, **more), follows
    )


def away(follows: int = 1, *, steps: int = 200, restarts: int = 5, loss: Any = "ce", **more: Any) -> Search:
    """Return a search away from the true class, from several random starts."""
    return Search(APGD(loss=loss, steps=steps, restarts=restarts, **more), follows)


def long(*follow: int, steps: int = 200) -> tuple[Search, ...]:
    """Return searches for a deterministic model: from five starts away from the class, from two to each other class."""
    return tuple(part for one in follow for part in (away(one, steps=steps), every_class(one, steps=steps)))


def drawn(*follow: int, draws: int = DRAWS, steps: int = 100, classes: int = 4) -> tuple[Search, ...]:
    """Return searches for a random model: fewer runs than in `long`, but each step averages over many predictions.

    The loss of the first search divides the margin of each prediction by the spread of the prediction's logits, so that
    all predictions have equal weight.
    """
    return tuple(
        part
        for one in follow
        for part in (
            away(one, steps=2 * steps, restarts=1, loss="scaled_margin", eot_iter=draws),
            every_class(one, steps=steps, restarts=1, classes=classes, eot_iter=draws),
        )
    )


#: The chains for models with usable gradients. OWN is for deterministic models, and OWN_DRAWN for random models.
OWN, OWN_DRAWN = long(0), drawn(0)


def chain(entry: Entry) -> tuple[Search, ...]:
    """Return the searches of the adaptive attack on an entry's model."""
    return entry.chain or (OWN_DRAWN if entry.random else OWN)


def specs(entry: Entry, followed: Sequence[nn.Module | None]) -> list[AttackSpec]:
    """Return the adaptive attack on an entry's model as a list of attacks, one for each search."""
    return [
        AttackSpec(part.attack, label=f"part {i + 1}", through=followed[part.follows], survivors_only=True)
        for i, part in enumerate(chain(entry))
    ]
