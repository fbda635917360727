"""The rows over several attacks: the worst outcome for each image, over the attacks and over the probes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .rows import Row, Worst, by_worst_points


def worst_rows(rows: Sequence[Row]) -> list[Row]:
    """Make the rows over several attacks, in which an image is robust if it is robust in all of their rows."""
    full = max(row.n for row in rows)
    attacks = [row for row in rows if row.is_attack]
    apart = [row for row in attacks if row.threat is None and not row.deployed and row.n == full]
    clean = [row for row in rows if row.kind == "clean" and row.deployed and row.wrong is not None]
    groups: list[tuple[str, list[Row], int]] = []
    for variant in dict.fromkeys(row.variant for row in apart):
        of_variant = [row for row in apart if row.variant == variant]
        groups += [(f"worst, {variant}", of_variant, full)] if len(of_variant) > 1 else []
    for threat in dict.fromkeys([None, *(row.threat for row in attacks)]):
        deployed = [row for row in attacks if row.threat == threat and row.deployed]
        if threat is None or len(deployed) > 1:
            name = "worst" if threat is None else f"worst, {threat}"
            for n in sorted({row.n for row in deployed}, reverse=True):
                label = name if n == full else f"{name}, first {n}"
                groups.append((label, [row for row in deployed if row.n >= n], n))
    return [_row(*group, clean) for group in groups]


def count_fallen(rows: Sequence[Row], fallen: Sequence[int], eps: float, points: Worst | None = None) -> None:
    """Count the images that fell to probes in the ``worst`` rows."""
    for row in rows:
        larger = row.settings.get("eps", 0) > eps
        if row.kind == "worst" and row.deployed and (row.threat is None or larger):
            mine = np.array([image < row.n for image in fallen], dtype=bool)
            index = np.asarray(fallen, dtype=np.int64)[mine]
            if points is None:
                row.robust = row.robust.copy()
                row.robust[index] = False
            else:
                # Copies, because the row of an attack may have the same arrays.
                known = Worst(*(array.copy() for array in Worst.of_row(row, row.n)))
                found = Worst(*(array[mine] for array in points))
                worse = found.is_worse(Worst(*(array[index] for array in known)))
                index = index[worse]
                for array, new in zip(known, found, strict=True):
                    array[index] = new[worse]
                row.count(known)
            row.reliable = row.reliable or bool((row.share_wrong == 1).all())
            row.fell_to_probes = len(index)


def _row(label: str, group: Sequence[Row], n: int, clean: Sequence[Row]) -> Row:
    """Make a row over the attacks ``group``, on the first n images; ``clean`` is the clean row of a random model."""
    first = group[0]
    robust = np.logical_and.reduce([row.robust[:n] for row in group])
    attacked = [row for row in group if row.attacked]
    # The row is reliable if the model's own gradients were usable in at least one attack, because further attacks can
    # only lower the accuracy. Transferred images say nothing about these gradients.
    had_gradients = any(row.reliable and row.health is not None for row in attacked if row.own_gradients)
    whole = Row(
        model=first.model,
        attack=label,
        kind="worst",
        variant=first.variant,
        robust=robust,
        n_eval=first.n_eval,
        seed=first.seed,
        seconds=sum(row.seconds for row in group),
        data=first.data,
        settings={"over": [row.attack for row in group]},
        deterministic=first.deterministic,
        attacked=max(row.attacked or 0 for row in group),
        threat=first.threat,
        nonfinite_predictions=min(sum(row.nonfinite_predictions for row in group), n * first.n_eval),
        # Draws that all images of a call share are the same in every row, so the first row shows how much they vary.
        of_draws=first.of_draws,
    )
    if first.wrong is not None:
        whole.count(by_worst_points([*clean, *group], n))
    # Missing gradients are no reason for doubt if no image was attacked, or if every image fell.
    whole.reliable = not attacked or had_gradients or bool((whole.share_wrong == 1).all())
    return whole
