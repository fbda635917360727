"""The worst over every row, image by image: what no single attack of the report can refute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .rows import Row


def worst(rows: Sequence[Row]) -> list[Row]:
    """Per image, the worst over every row of one threat model on the same images, judged by the deployed model.

    AutoAttack, transferred images and rows of survivors count like every other: an image that one of them broke is
    broken. A row that a variant of a random model judged (fixed noise, noise off) counts for that variant alone; what
    it found was tried on the deployed model too, in a row that counts here. Attacks on fewer images, the first so many,
    enter the row that is named after these (``worst, first 200``), beside all that the other attacks found on the same
    images; they neither lower nor raise the row over all images.

    Args:
        rows: of one model, the clean ones included.

    Returns:
        For the report's threat model a row over all images (``worst``), one for every smaller number of images, and one
        for each variant with several attacks (``worst, deterministic``). For another threat model the first two, where
        it has several attacks.
    """
    full = max(row.n for row in rows)
    attacks = [row for row in rows if row.is_attack]
    made = []
    for threat in dict.fromkeys([None, *(row.threat for row in attacks)]):
        mine = [row for row in attacks if row.threat == threat]
        deployed = [row for row in mine if row.deployed]
        if threat is None:
            made += _of_variants([row for row in mine if not row.deployed], full)
        if threat is None or len(deployed) > 1:
            made += _of_deployed(deployed, full, "worst" if threat is None else f"worst, {threat}")
    return made


def _of_variants(rows: Sequence[Row], full: int) -> list[Row]:
    """One row for each variant with several attacks on all images."""
    complete = [row for row in rows if row.n == full]
    variants = dict.fromkeys(row.variant for row in complete)
    groups = {variant: [row for row in complete if row.variant == variant] for variant in variants}
    return [_row(f"worst, {variant}", group, full) for variant, group in groups.items() if len(group) > 1]


def _of_deployed(rows: Sequence[Row], full: int, name: str) -> list[Row]:
    """A row over all images, and one for every smaller number of them."""
    complete = [row for row in rows if row.n == full]
    made = [_row(name, complete, full)] if complete else []
    for n in sorted({row.n for row in rows if row.n < full}, reverse=True):
        made.append(_row(f"{name}, first {n}", [row for row in rows if row.n >= n], n))
    return made


def _row(label: str, group: Sequence[Row], n: int) -> Row:
    robust = np.logical_and.reduce([row.robust[:n] for row in group])
    accuracy = float(robust.mean())
    first = group[0]
    attacked = [row for row in group if row.settings["attacked"]]
    # what was found elsewhere and carried over says nothing about the gradients of the model itself; of its own attacks
    # one that had gradients is enough, the others can only have lowered the number
    had_gradients = any(row.reliable and row.health is not None for row in attacked if row.follows_own_gradients)
    known = {name: value for name, value in first.settings.items() if name == "deterministic"}
    return Row(
        model=first.model,
        attack=label,
        kind="worst",
        variant=first.variant,
        robust=robust,
        mean=accuracy,
        worst=accuracy,
        n_eval=first.n_eval,
        seed=first.seed,
        seconds=sum(row.seconds for row in group),
        data=first.data,
        # where there was nothing to attack, or nothing is left, no attack lacked anything
        reliable=not attacked or had_gradients or not robust.any(),
        settings={
            "over": [row.attack for row in group],
            "attacked": max(row.settings["attacked"] for row in group),
            **known,
        },
        threat=first.threat,
    )
