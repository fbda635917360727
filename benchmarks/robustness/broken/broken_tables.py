"""Score the results on the broken defences, and make the tables for docs/judge_reference.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from purify_fast.evaluation.show.tables import UNRELIABLE, markdown_table

from ...kept import Row, rows_of

# These imports add the entries to `ENTRIES`. The module `honest` also imports the defences.
from . import honest as _honest  # noqa: F401
from . import mistakes as _mistakes  # noqa: F401
from .entry import ENTRIES as ENTRIES

FILE = "broken.json"
ADAPTIVE, OFFICIAL, STANDARD, STRONG = "adaptive", "AutoAttack", "standard", "strong"
PINTOR = "indicators"
#: The judges, in the order in which they evaluate a model.
JUDGES = (ADAPTIVE, STANDARD, OFFICIAL, PINTOR, STRONG)
#: The judges that are compared with the adaptive attack.
ATTACKERS = (OFFICIAL, STANDARD, STRONG)
#: The number of steps of an attack that does not set a number itself.
STEPS = 100
#: A judge that exceeds the adaptive attack by at most this share has found the weakness; 1e-9 is for rounding.
CLOSE = 0.02 + 1e-9

#: The type of a result, which is a row of the results file.
Result = Row


def left(result: Result, images: int | None = None) -> float:
    """Return the robust accuracy in a result.

    Args:
        result: result of a judge that attacks images.
        images: number of the first images that are used. None means all images.
    """
    return statistics.fmean(image == "1" for image in result["robust"][:images])


def overestimated(each: dict[str, Result], judge: str) -> float | None:
    """Return a judge's robust accuracy minus the adaptive attack's, on the images of both; None without results.

    Args:
        each: results on a model, by the names of the judges.
        judge: name of the judge in `ATTACKERS`.
    """
    if not {judge, ADAPTIVE} <= each.keys():
        return None
    common = min(len(each[judge]["robust"]), len(each[ADAPTIVE]["robust"]))
    return left(each[judge], common) - left(each[ADAPTIVE], common)


def verdicts(each: dict[str, Result]) -> dict[str, str]:
    """Compare the judges in `ATTACKERS` with the adaptive attack on a model.

    Args:
        each: results on the model, by the names of the judges.

    Returns:
        A verdict for each judge. It is "found" if the judge's robust accuracy is close to that of the adaptive attack,
        "flagged" if this accuracy is higher but the judge calls it unreliable, and otherwise "missed". The verdict is
        "-" if the judge or the adaptive attack has no result.
    """
    said = {}
    for judge in ATTACKERS:
        more = overestimated(each, judge)
        flagged = "flagged" if judge in each and each[judge]["unreliable"] else "missed"
        said[judge] = "-" if more is None else "found" if more <= CLOSE else flagged
    return said


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _numbers(each: dict[str, Result]) -> list[str]:
    """Return a model's cells: the number of images, the clean accuracy and each judge's robust accuracy, in percent."""
    first = next(each[judge] for judge in (ADAPTIVE, STANDARD, OFFICIAL) if judge in each)
    row = [str(len(first["robust"])), _percent(first["clean"])]
    for judge in (ADAPTIVE, *ATTACKERS):
        if judge not in each:
            row.append("-")
            continue
        one = each[judge]
        fewer = f" (of {len(one['robust'])})" if len(one["robust"]) < len(first["robust"]) else ""
        row.append(_percent(left(one)) + fewer + (f" **{UNRELIABLE}**" if one["unreliable"] else ""))
    return row


def _score(broken: dict[str, dict[str, Result]]) -> list[str]:
    """Return sentences that count the verdicts of each judge, and the defences that AutoAttack overestimates."""
    lines = []
    for judge in ATTACKERS:
        words = [verdicts(each)[judge] for each in broken.values()]
        if asked := len(words) - words.count("-"):
            found, flagged, missed = map(words.count, ("found", "flagged", "missed"))
            lines += [
                "",
                f"`{judge}` judged {asked} defences: it found {found} weaknesses, flagged {flagged} defences, and "
                f"missed {missed} weaknesses.",
            ]
    gaps = {name: overestimated(each, OFFICIAL) or 0 for name, each in broken.items()}
    more = {name: gap for name, gap in gaps.items() if gap > CLOSE}
    if more:
        worst = max(more, key=more.__getitem__)
        lines += [
            "",
            f"AutoAttack overestimates the robust accuracy of {len(more)} defences by more than 2 points. "
            f"The largest overestimate is {_percent(more[worst])} points, for {worst}.",
        ]
    return lines


def markdown(results: Sequence[Result]) -> list[str]:
    """Return all tables for docs/judge_reference.md.

    Args:
        results: the results so far. A model is left out if no attack has a result on it. A missing result of a judge is
            shown as a dash.
    """
    every = {name: {one["judge"]: one for one in results if one["model"] == name} for name in ENTRIES}
    every = {name: each for name, each in every.items() if {ADAPTIVE, STANDARD, OFFICIAL} & each.keys()}
    broken = {name: each for name, each in every.items() if ENTRIES[name].paper}
    head = ["images", "clean, %", "truth, %", *ATTACKERS]
    if not every:
        return ["There are no results yet. Run `python -m benchmarks broken`."]
    body = []
    for name, each in broken.items():
        entry, said = ENTRIES[name], verdicts(each)
        words = [said[STANDARD], said[STRONG]]
        body.append([f"{name} ({entry.paper})", entry.attack, entry.published, *_numbers(each), *words])
    says = [f"{judge} says" for judge in (STANDARD, STRONG)]
    lines = markdown_table(["defence", "adaptive attack", "published, %", *head, *says], body)
    lines += _score(broken)
    lines += ["", "The number of models that each method flags, and the models that only this method flags:"]
    lines += ["", *_who_notices(every)]
    for title, honest, why in (("honest model", True, []), ("model with a fault", False, ["why"])):
        rows = [
            [name, *_numbers(each), *([ENTRIES[name].why] if why else [])]
            for name, each in every.items()
            if not ENTRIES[name].paper and ENTRIES[name].honest == honest
        ]
        if rows:
            lines += ["", *markdown_table([title, *head, *why], rows)]
    return lines


#: The methods that detect failed attacks, with their names in tables.
WAYS = {STANDARD: "signs of `standard`", PINTOR: "indicators (Pintor et al.)"}


def _who_notices(every: dict[str, dict[str, Result]]) -> list[str]:
    """Return a table that compares the methods that detect failed attacks, by the models that each method flags."""
    asked = {judge: {name for name, each in every.items() if judge in each} for judge in WAYS}
    flagged = {judge: {name for name in names if every[name][judge]["unreliable"]} for judge, names in asked.items()}
    kinds = {name: (ENTRIES[name].paper, ENTRIES[name].honest, ENTRIES[name].why) for name in every}
    defences, *others = ({name for name, kind in kinds.items() if kind[i]} for i in range(3))
    groups = [defences, {name for name in defences if (overestimated(every[name], OFFICIAL) or 0) > CLOSE}, *others]
    body = []
    for judge, words in WAYS.items():
        counts = [f"{len(flagged[judge] & group)} of {len(asked[judge] & group)}" for group in groups]
        elsewhere = set[str]().union(*(names for other, names in flagged.items() if other != judge))
        body.append([words, *counts, "; ".join(name for name in every if name in flagged[judge] - elsewhere) or "-"])
    heads = ["defences", "defences that AutoAttack overestimates", "honest models", "models with a fault"]
    return markdown_table(["method", *heads, "only by this method"], body)


def table(results: Path) -> list[str]:
    """Return all tables of the committed results.

    Args:
        results: the folder ``benchmarks/results``.
    """
    return markdown(rows_of(results / FILE))
