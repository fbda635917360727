"""The parts of adaptive attacks, which take about ten times as many gradients as the protocol ``standard``.

On an image that withstands, ``standard`` takes some hundreds of gradients. The chains here take some thousands. They
attack every wrong class from several starts by two losses, with more steps, or for a random model with more draws in
each step. They never stop early.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from purify_fast.attacks import APGD
from purify_fast.evaluation import AttackSpec

from .entry import Entry, Search

#: How many draws attacks on random models average in each step: DRAWS usually, MANY_DRAWS for models whose draws are
#: cheap.
DRAWS, MANY_DRAWS = 20, 40


def every_class(follows: int = 1, *, steps: int = 200, restarts: int = 2, classes: int = 9, **more: Any) -> Search:
    """Attack towards one wrong class after the other, by the margin, which does not saturate.

    Args:
        follows: model whose gradients are taken, as in `Search`.
        steps: number of steps of each run.
        restarts: number of random starts for each class.
        classes: number of wrong classes; the nearest comes first.
        more: further options of `APGD`.
    """
    return Search(
        APGD(loss="margin_targeted", steps=steps, restarts=restarts, n_target_classes=classes, **more), follows
    )


def away(follows: int = 1, *, steps: int = 200, restarts: int = 5, loss: Any = "ce", **more: Any) -> Search:
    """Attack away from the true class, from several random starts.

    Args:
        follows: model whose gradients are taken, as in `Search`.
        steps: number of steps of each run.
        restarts: number of random starts.
        loss: the loss.
        more: further options of `APGD`.
    """
    return Search(APGD(loss=loss, steps=steps, restarts=restarts, **more), follows)


def long(*follow: int, steps: int = 200) -> tuple[Search, ...]:
    """Attack every wrong class from two starts and the cross-entropy from five, along the gradients of some models.

    Args:
        follow: models whose gradients are taken, as in `Search`.
        steps: number of steps of each run.
    """
    return tuple(part for one in follow for part in (away(one, steps=steps), every_class(one, steps=steps)))


def drawn(*follow: int, draws: int = DRAWS, steps: int = 100, classes: int = 4) -> tuple[Search, ...]:
    """Attack a random model by fewer runs, each step of which averages over many draws.

    The margin of each draw is divided by the spread of its logits, so that no draw counts more than the others.

    Args:
        follow: models whose gradients are taken, as in `Search`.
        draws: number of draws that each step averages.
        steps: number of steps of each run.
        classes: number of wrong classes; the nearest comes first.
    """
    return tuple(
        part
        for one in follow
        for part in (
            away(one, steps=2 * steps, restarts=1, loss="scaled_margin", eot_iter=draws),
            every_class(one, steps=steps, restarts=1, classes=classes, eot_iter=draws),
        )
    )


#: The chains of attacks for models that hide no gradients, deterministic and random.
OWN, OWN_DRAWN = long(0), drawn(0)


def chain(entry: Entry) -> tuple[Search, ...]:
    """The parts of an entry's adaptive attack."""
    return entry.chain or (OWN_DRAWN if entry.random else OWN)


def specs(entry: Entry, followed: Sequence[nn.Module | None]) -> list[AttackSpec]:
    """The adaptive attack of an entry, with a row for each part.

    Args:
        entry: the entry.
        followed: the models that `Build` returned. The first is the deployed model, whose gradients need no name: None.
    """
    return [
        AttackSpec(part.attack, label=f"part {i + 1}", gradients_from=followed[part.follows], survivors_only=True)
        for i, part in enumerate(chain(entry))
    ]
