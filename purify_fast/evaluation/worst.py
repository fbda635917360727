"""The worst over several attacks, image by image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .rows import Row

#: The attacks that a ``worst`` is made of; AutoAttack, itself a worst over four, stands beside it.
IN_WORST = ("pgd", "apgd", "fgsm", "bpda", "stadv", "function")


def worst(rows: Sequence[Row]) -> list[Row]:
    """Per image, the worst over the attacks on all images, by variant and over all, each threat model by itself.

    AutoAttack and attacks on another target than the defence do not count. Of another threat model than the report's
    there is a row only where it has several attacks.
    """
    full = max(row.n for row in rows)
    mine = [r for r in rows if r.kind in IN_WORST and r.n == full and r.settings["target"] == "defence"]
    main = [row for row in mine if row.threat is None]
    variants = list(dict.fromkeys(row.variant for row in main))
    groups = [(f"worst, {variant}", [r for r in main if r.variant == variant]) for variant in variants]
    groups = [*(groups if len(groups) > 1 else []), ("worst", main)]
    for threat in dict.fromkeys(row.threat for row in mine if row.threat is not None):
        group = [row for row in mine if row.threat == threat]
        groups += [(f"worst, {threat}", group)] if len(group) > 1 else []
    return [_row(label, group) for label, group in groups if group]


def _row(label: str, group: Sequence[Row]) -> Row:
    robust = np.logical_and.reduce([row.robust for row in group])
    accuracy = float(robust.mean())
    first = group[0]
    one_variant = len({row.variant for row in group}) == 1 and label != "worst"
    attacked = [row for row in group if row.settings["attacked"]]
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
        reliable=not attacked or any(row.reliable and row.health is not None for row in attacked),
        settings={"over": [row.attack for row in group], "attacked": max(row.settings["attacked"] for row in group)},
        threat=first.threat,
    )
