"""The parts that adaptive attacks are put together from: about ten times what the protocol ``standard`` spends.

On an image that stands, ``standard`` takes some hundreds of gradients. The chains here take some thousands: every wrong
class from several starts by two losses, more steps, or for a random model more draws for each step. They stop early
nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from purify_fast.attacks import APGD
from purify_fast.evaluation import AttackSpec

from .entry import Entry, Search

#: Draws that attacks on random models average for each step, and of those whose draws are cheap.
DRAWS, MANY_DRAWS = 20, 40


def every_class(follows: int = 1, *, steps: int = 200, restarts: int = 2, classes: int = 9, **more: Any) -> Search:
    """Towards one wrong class after the other, by the margin, which does not saturate.

    Args:
        follows: whose gradients it takes, as of `Search`.
        steps: of each run.
        restarts: random starts for each class.
        classes: how many wrong classes, the nearest first.
        more: further options of `APGD`.
    """
    return Search(
        APGD(loss="margin_targeted", steps=steps, restarts=restarts, n_target_classes=classes, **more), follows
    )


def away(follows: int = 1, *, steps: int = 200, restarts: int = 5, loss: Any = "ce", **more: Any) -> Search:
    """Away from the true class, from several random starts.

    Args:
        follows: whose gradients it takes, as of `Search`.
        steps: of each run.
        restarts: random starts.
        loss: that is raised.
        more: further options of `APGD`.
    """
    return Search(APGD(loss=loss, steps=steps, restarts=restarts, **more), follows)


def long(*follow: int, steps: int = 200) -> tuple[Search, ...]:
    """Every wrong class from two starts and the cross-entropy from five, along each of some gradients.

    Args:
        follow: whose gradients, as of `Search`.
        steps: of each run.
    """
    return tuple(part for one in follow for part in (away(one, steps=steps), every_class(one, steps=steps)))


def drawn(*follow: int, draws: int = DRAWS, steps: int = 100, classes: int = 4) -> tuple[Search, ...]:
    """The same for a random model: fewer runs, each step of which averages over many draws.

    The margin of each draw is divided by the spread of its logits, so that no draw counts more than the others.

    Args:
        follow: whose gradients, as of `Search`.
        draws: averaged for each step.
        steps: of each run.
        classes: how many wrong classes, the nearest first.
    """
    parts: list[Search] = []
    for one in follow:
        parts.append(away(one, steps=2 * steps, restarts=1, loss="scaled_margin", eot_iter=draws))
        parts.append(every_class(one, steps=steps, restarts=1, classes=classes, eot_iter=draws))
    return tuple(parts)


#: Of models without anything that hides their gradients.
OWN, OWN_DRAWN = long(0), drawn(0)


def chain(entry: Entry) -> tuple[Search, ...]:
    """The parts of an entry's adaptive attack.

    Args:
        entry: of the table.
    """
    return entry.chain or (OWN_DRAWN if entry.random else OWN)


def specs(entry: Entry, followed: Sequence[nn.Module | None]) -> list[AttackSpec]:
    """The adaptive attack of an entry, a row for each part.

    Args:
        entry: of the table.
        followed: what `Build` returned: first what is deployed, whose gradients need no name (None), then the others.
    """
    return [
        AttackSpec(
            part.attack,
            label=f"part {i + 1}",
            gradients_from=followed[part.follows],
            survivors_only=True,
        )
        for i, part in enumerate(chain(entry))
    ]
