"""An estimate from the report's own rows: how much a stronger attack would still take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..rows import Row
from .evidence import Evidence


@dataclass(frozen=True)
class Outlook:
    """An estimate of what one more effort of the same kind would find.

    Args:
        points: of accuracy, between 0 and 1: the largest of what the signs below say.
        sentences: the signs, in words.
        model: the model's name.
    """

    points: float
    sentences: tuple[str, ...]
    model: str = ""


def outlook(evidence: Evidence) -> Outlook | None:
    """The estimate for one model, from its attacks on all images; None without any, and where no image is left.

    Args:
        evidence: rows and probes of the model.
    """
    full = max((row.n for row in evidence.rows), default=0)
    fallen = [(row, mask) for row, mask in evidence.fallen() if row.n == full]
    if not fallen:
        return None
    robust = np.logical_and.reduce([row.robust for row, _ in fallen])
    if not robust.any():
        return None
    signs = [_last_gain(fallen, full), _unseen(fallen, full), _margins(fallen, robust), _steps(evidence, robust)]
    known = [sign for sign in signs if sign is not None]
    points = min(max(points for points, _ in known), float(robust.mean()))
    text = (
        f"by this estimate one more effort of this kind would take about {100 * points:.1f} of the "
        f"{100 * robust.mean():.1f} percentage points that are left"
    )
    return Outlook(points, (text, *(sentence for _, sentence in known)))


Fallen = Sequence[tuple[Row, np.ndarray]]


def _last_gain(fallen: Fallen, n: int) -> tuple[float, str]:
    """What the last attack found that no other had, if it repeats one before it; the first of a kind tells nothing."""
    row, mask = fallen[-1]
    if len(fallen) == 1:
        return 0.0, f"there was one attack only ({row.attack}): nothing tells what another would find"
    gain = int((mask & ~np.logical_or.reduce([m for _, m in fallen[:-1]])).sum())
    text = f"the last attack ({row.attack}) found {gain} image{'' if gain == 1 else 's'} that all others had left"
    if not any(_alike(row, other) for other, _ in fallen[:-1]):
        return 0.0, f"{text}; it was the first of its kind, so this says nothing of another one"
    return gain / n, text


def _alike(row: Row, other: Row) -> bool:
    """Whether two rows are of the same attack with the same loss, whatever their random starts and numbers of steps."""
    return (row.kind, row.settings.get("loss")) == (other.kind, other.settings.get("loss"))


def _unseen(fallen: Fallen, n: int) -> tuple[float, str] | None:
    """Images that only one of several attacks on all images found: many of these mean that others are unseen.

    The estimate of the unseen is Chao's lower bound (1984), f1 (f1 - 1) / (2 (f2 + 1)), f1 being the number of images
    that one attack alone found, and f2 that two found.
    """
    whole = [(row, mask) for row, mask in fallen if not row.of_survivors]
    if len(whole) < 3:
        return None
    times = np.sum([mask for _, mask in whole], 0)
    once, twice = int((times == 1).sum()), int((times == 2).sum())
    unseen = once * (once - 1) / (2 * (twice + 1))
    return unseen / n, (
        f"{once} images fell to one attack only and {twice} to two, from which about {unseen:.0f} more are expected "
        "to fall to further attacks of these kinds"
    )


def _margins(fallen: Fallen, robust: np.ndarray) -> tuple[float, str] | None:
    """How near the images that are left came to falling, against what the last gradient attack gained on them."""
    measured = [row.margins for row, _ in fallen if row.margins is not None and row.health is not None]
    if len(measured) < 2:
        return None
    before = np.minimum.reduce(measured[:-1])[robust]
    last = measured[-1][robust]
    nearest = np.minimum(before, last)
    gained = np.maximum(before - last, 0)
    if not np.isfinite(nearest).all():
        return None
    # the chance that as much is gained once more as is still missing, over what was gained on any image
    chance = (gained[None, :] >= np.maximum(nearest, 1e-12)[:, None]).mean(1)
    points = float(chance.sum() / len(robust))
    return points, (
        "on the images that are left, the logit of the true class leads the next one by "
        f"{float(np.median(nearest)):.2g} in the median; the last attack by gradients lowered this lead by "
        f"{float(np.median(gained)):.2g}"
    )


def _steps(evidence: Evidence, robust: np.ndarray) -> tuple[float, str] | None:
    """Whether more steps still find more."""
    if evidence.probes is None:
        return None
    (a, before), (b, after) = evidence.probes.steps[-2:]
    gain = max(0.0, before - after)
    # one image more or less is luck
    gains = gain * evidence.probes.n >= 1.5
    means = "further steps still find more" if gains else "further steps find hardly more"
    return (
        gain * float(robust.mean()) if gains else 0.0,
        f"a short PGD leaves {100 * before:.0f} % after {a:.0f} steps and {100 * after:.0f} % after {b:.0f}: {means}",
    )
