"""Compute short hashes of the code on which a result depends.

Each result is saved with its hashes. If a hash has changed, the result is outdated. A result depends on the files that
make the models, on the attacks of the judge, and on the signs by which a report is called unreliable.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from purify_fast import zoo
from purify_fast._tensors import text_hash, weights_fingerprint
from purify_fast.attacks import AutoAttack
from purify_fast.evaluation import AttackSpec
from purify_fast.evaluation.alarms import signs

from ... import kept
from .. import revisions
from . import adaptive, pintor
from .broken_tables import ADAPTIVE, ENTRIES, FILE, OFFICIAL, PINTOR
from .entry import Entry

#: Increase this number if a change in this folder changes results: older saved results are then computed again.
REVISION = 1
#: The files that make the models: any change of them, also of a comment, outdates the results of all models.
SOURCES = ("defences.py", "entry.py", "honest.py", "mistakes.py")


def code(name: str, judge: str) -> dict[str, str]:
    """Return short hashes of the code that makes a result.

    Args:
        name: name of the model in `ENTRIES`.
        judge: name of the judge in `broken_tables.JUDGES`.
    """
    entry = ENTRIES[name]
    # The indicators do not evaluate the model.
    rule = [] if judge == PINTOR else revisions.of_rule(entry.random)
    return {"model": _of_models(), "judge": _short("\n".join([f"{REVISION}", *_of_judge(entry, judge), *rule]))}


def _short(text: str) -> str:
    return text_hash(text).hexdigest()[:12]


def _of_judge(entry: Entry, judge: str) -> list[str]:
    if judge == PINTOR:
        return [f"indicators {pintor.REVISION}"]
    if judge == OFFICIAL:
        spec = AttackSpec(AutoAttack(version="rand" if entry.random else "standard"))
        return revisions.of_attacks([spec])
    if judge == ADAPTIVE:
        specs = adaptive.specs(entry, [None] * 10)
        follows = [str(part.follows) for part in adaptive.chain(entry)]
        return [*revisions.of_attacks(specs), *follows]
    # A protocol that finds signs of masked gradients also attacks surrogates, so include their revision and the limits.
    return [*revisions.of_protocol(judge, entry.random), f"surrogates {revisions.SURROGATES}", *_of_signs()]


def _of_signs() -> list[str]:
    """Return the names of the report's signs, and the constants that decide whether a sign fails."""
    values = {name: value for name, value in vars(signs).items() if name.isupper()}
    limits = [f"{name} {value}" for name, value in values.items() if isinstance(value, int | float)]
    return [*(alarm.name for alarm in signs.ALARMS), *sorted(limits)]


@functools.cache
def _of_models() -> str:
    """Return a hash of the source files that make the models, and of the weights of the zoo's models that they name."""
    text = "\n".join(Path(__file__).with_name(file).read_text() for file in SOURCES)
    words = set(text.replace("'", '"').split('"'))
    with torch.random.fork_rng([]):
        weights = [f"{name} {weights_fingerprint(zoo.load(name))}" for name in zoo.list() if name in words]
    return _short("\n".join([text, *weights]))


def outdated(results: Path) -> list[str]:
    """Return a message for each result whose code has changed since it was computed.

    Args:
        results: the folder ``benchmarks/results``.
    """
    return [
        kept.outdated(FILE, f"{one['judge']} of {one['model']!r}", "broken")
        for one in kept.rows_of(results / FILE)
        if one["model"] not in ENTRIES or one["code"] != code(one["model"], one["judge"])
    ]
