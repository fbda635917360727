"""The worst over every row, image by image: what no single attack of the report can refute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .rows import OWN_TARGETS, Row


def worst(rows: Sequence[Row]) -> list[Row]:
    """Per image, the worst over every row of one threat model on the same images.

    AutoAttack, transferred images and rows of survivors count like every other: an image that one of them broke is
    broken. Attacks on fewer images, the first so many, enter the row that is named after these (``worst, first 200``),
    beside all that the other attacks found on the same images; they neither lower nor raise the row over all images.

    Args:
        rows: of one model, the clean ones included.

    Returns:
        For the report's threat model a row over all images (``worst``), where several variants were attacked one for
        each (``worst, deterministic``), and one for every smaller number of images. For another threat model the same
        where it has several attacks.
    """
    full = max(row.n for row in rows)
    attacks = [row for row in rows if row.is_attack]
    made = []
    for threat in dict.fromkeys([None, *(row.threat for row in attacks)]):
        mine = [row for row in attacks if row.threat == threat]
        if threat is None or len(mine) > 1:
            made += _of_threat(mine, full, "worst" if threat is None else f"worst, {threat}")
    return made


def _of_threat(rows: Sequence[Row], full: int, name: str) -> list[Row]:
    complete = [row for row in rows if row.n == full]
    variants = list(dict.fromkeys(row.variant for row in complete)) if name == "worst" else []
    groups = [(f"worst, {variant}", [row for row in complete if row.variant == variant]) for variant in variants]
    made = [_row(label, group, full) for label, group in groups if len(groups) > 1]
    made += [_row(name, complete, full)] if complete else []
    for n in sorted({row.n for row in rows if row.n < full}, reverse=True):
        made.append(_row(f"{name}, first {n}", [row for row in rows if row.n >= n], n))
    return made


def _row(label: str, group: Sequence[Row], n: int) -> Row:
    robust = np.logical_and.reduce([row.robust[:n] for row in group])
    accuracy = float(robust.mean())
    first = group[0]
    one_variant = label.endswith(f", {first.variant}")
    attacked = [row for row in group if row.settings["attacked"]]
    # what was found elsewhere and carried over says nothing about the gradients of the model itself
    own = [row for row in attacked if row.settings.get("target", "defence") in OWN_TARGETS]
    return Row(
        model=first.model,
        attack=label,
        kind="worst",
        variant=first.variant if one_variant else "all",
        robust=robust,
        mean=accuracy,
        worst=accuracy,
        n_eval=first.n_eval,
        seed=first.seed,
        seconds=sum(row.seconds for row in group),
        data=first.data,
        # one attack that had gradients is enough, the others can only have lowered the number; where there was nothing
        # to attack, no attack lacked anything
        reliable=not attacked or any(row.reliable and row.health is not None for row in own),
        settings={"over": [row.attack for row in group], "attacked": max(row.settings["attacked"] for row in group)},
        threat=first.threat,
    )
