"""Alarms that the rows of a report raise, and what is known of the model without asking it again."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..outputs import INSTEAD_OF_PROBABILITIES
from ..rows import GRADIENT_FREE, OWN_TARGETS, Row
from .finding import Evidence, Finding

#: The share of all images that may fall to something else than the model's own gradients.
MOST_MISSED = 0.03


#: The alarm about a model that guesses; a report also tells it beside its headline.
GUESSING = "better than guessing"


def better_than_guessing(evidence: Evidence) -> Finding | None:
    """Whether the model classifies clean images better than a guess would."""
    clean = next((row for row in evidence.rows if row.kind == "clean"), None)
    if clean is None or evidence.classes is None:
        return None
    chance = 1 / evidence.classes
    text = (
        f"{100 * clean.mean:.1f} % of the clean images are classified correctly; a guess among {evidence.classes} "
        f"classes is right for {100 * chance:.1f} %"
    )
    if clean.mean > chance + 2 * math.sqrt(chance * (1 - chance) / clean.n):
        return Finding(GUESSING, "passed", text)
    ask = "is the model trained, do the labels count as its classes do, and does it take images in [0, 1]?"
    return Finding(GUESSING, "noted", f"{text}: {ask}", clean.attack)


def finite_predictions(evidence: Evidence) -> Finding:
    """Whether every prediction names a class."""
    broken = [row for row in evidence.rows if row.nonfinite_predictions]
    if not broken:
        return Finding("finite predictions", "passed", "every prediction names a class")
    worst = max(broken, key=lambda row: row.nonfinite_predictions / (row.n * row.n_eval))
    text = f"{worst.nonfinite_predictions} of {worst.n * worst.n_eval} predictions name no class; they count as wrong"
    return Finding("finite predictions", "unreliable", text, worst.attack)


def logits(evidence: Evidence) -> Finding | None:
    """Whether the model returns logits, and not the probabilities that a softmax makes of them."""
    if evidence.probabilities is None:
        return None
    if not evidence.probabilities:
        return Finding("logits", "passed", "what the model returns is not a list of probabilities")
    text = (
        "the model returns probabilities (from 0 to 1, with the sum 1), of which gradients vanish where it is sure: "
        f"{INSTEAD_OF_PROBABILITIES}"
    )
    return Finding("logits", "unreliable", text)


def gradient_health(evidence: Evidence) -> Finding | None:
    """Whether some attack through the whole model had gradients to work with."""
    asked = [row for row in evidence.attacks() if row.health is not None and row.follows_own_gradients]
    if not asked:
        return Finding("gradient health", "not asked", "no attack counted the gradients of the model itself")
    broken = [row for row in asked if row.lacked_gradients]
    if not broken:
        all_of = "the attack" if len(asked) == 1 else f"all {len(asked)} attacks"
        return Finding("gradient health", "passed", f"{all_of} had finite gradients that moved the images")
    row = broken[0]
    shares = f"non-finite / zero / images not moved: {row.describe_health()}"
    if len(broken) < len(asked):
        return Finding(
            "gradient health",
            "noted",
            f"{len(broken)} of {len(asked)} attacks lacked usable gradients; {shares}",
            row.attack,
        )
    return Finding("gradient health", "unreliable", f"every attack lacked gradients; {shares}", row.attack)


def gradient_free_beats_gradients(evidence: Evidence) -> Finding | None:
    """Whether an attack without gradients breaks what gradients left."""
    return _beaten(evidence, "gradient-free against gradients", lambda row: row.kind in GRADIENT_FREE)


def transfer_beats_gradients(evidence: Evidence) -> Finding | None:
    """Whether what is found on another model, or by its gradients, breaks what the model's own gradients left."""
    return _beaten(evidence, "transfer against gradients", _elsewhere)


def _beaten(evidence: Evidence, alarm: str, other: Callable[[Row], bool]) -> Finding:
    fallen = evidence.fallen()
    mine = [(row, mask) for row, mask in fallen if row.follows_own_gradients and row.health is not None]
    theirs = [(row, mask) for row, mask in fallen if other(row)]
    if not mine or not theirs:
        missing = "no attack by the model's own gradients" if theirs else "no such attack"
        return Finding(alarm, "not asked", missing)
    full = max(row.n for row, _ in fallen)
    by_gradients = np.zeros(full, dtype=bool)
    for row, mask in mine:
        by_gradients[: row.n] |= mask
    only = [(row, int((mask & ~by_gradients[: row.n]).sum())) for row, mask in theirs]
    together = np.zeros(full, dtype=bool)
    for row, mask in theirs:
        together[: row.n] |= mask
    count = int((together & ~by_gradients).sum())
    best = max(only, key=lambda pair: pair[1])[0]
    text = f"{count} of {full} images fell to such an attack and withstood every one by the model's own gradients"
    # a few images are luck
    surely = count - 1.5 * math.sqrt(count)
    verdict = "unreliable" if surely > MOST_MISSED * full else "noted" if count > 0.01 * full else "passed"
    return Finding(alarm, verdict, text, best.attack if count else "")  # type: ignore[arg-type]


def _elsewhere(row: Row) -> bool:
    return row.settings.get("target", "defence") not in OWN_TARGETS


ROW_ALARMS = (
    better_than_guessing,
    finite_predictions,
    logits,
    gradient_health,
    gradient_free_beats_gradients,
    transfer_beats_gradients,
)
