"""The results file of the broken defences, the score of a result, and the tables that pages show."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from purify_fast.evaluation.alarms.signs import ALARMS
from purify_fast.evaluation.show.tables import UNRELIABLE, markdown_table

from ...kept import Row, rows_of
from . import honest as _honest  # noqa: F401 (each of the two fills the table of entries, the first with the defences)
from . import mistakes as _mistakes  # noqa: F401
from .entry import ENTRIES as ENTRIES

FILE = "broken.json"
ADAPTIVE, OFFICIAL, STANDARD, STRONG = "adaptive", "AutoAttack", "standard", "strong"
PINTOR, ACTIVE = "indicators", "active"
#: The judges in the order in which they judge a model.
JUDGES = (ADAPTIVE, STANDARD, OFFICIAL, PINTOR, ACTIVE, STRONG)
#: The judges that attack images, without the adaptive attack.
ATTACKERS = (OFFICIAL, STANDARD, STRONG)
#: How many steps an attack takes that sets no number itself.
STEPS = 100
#: A judge finds enough if it leaves at most this share of the images more than the adaptive attack. The tiny second
#: term allows for rounding.
CLOSE = 0.02 + 1e-9

#: The result of a judge on a model.
Result = Row


def left(result: Result, images: int | None = None) -> float:
    """The share of images that withstood a judge.

    Args:
        result: result of a judge that attacks.
        images: number of first images that count; None counts all.
    """
    return statistics.fmean(image == "1" for image in result["robust"][:images])


def overestimated(each: dict[str, Result], judge: str) -> float | None:
    """How much more a judge leaves than the adaptive attack, on the images that both attacked; None without both.

    Args:
        each: the results of a model by judge.
        judge: name in `ATTACKERS`.
    """
    if not {judge, ADAPTIVE} <= each.keys():
        return None
    common = min(len(each[judge]["robust"]), len(each[ADAPTIVE]["robust"]))
    return left(each[judge], common) - left(each[ADAPTIVE], common)


def verdicts(each: dict[str, Result]) -> dict[str, str]:
    """For each judge that attacks, a verdict: did it find what the adaptive attack found, or flag that it did not?

    Args:
        each: the results of a model by judge. Only the adaptive attack decides what is true.

    Returns:
        "found", "flagged", "missed", or "-" if the judge or the adaptive attack has not judged.
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
    """The number of images, and in percent clean accuracy and what the adaptive attack and the other judges leave."""
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


def _noticed(each: dict[str, Result]) -> list[str]:
    """The signs of ``standard``, the indicators and the active test that say that attacks fail."""
    cells = [", ".join(each[judge]["unreliable"]) or "none" if judge in each else "-" for judge in (STANDARD, PINTOR)]
    test = "-"
    if ACTIVE in each:
        one = each[ACTIVE]
        reason = one.get("reason") or "no extra output separates its corner"
        test = f"found {one['found']} of {one['planted']}" if one["planted"] else f"not asked: {reason}"
        test += f" **{UNRELIABLE}**" if one["unreliable"] else ""
    return [*cells, test]


def _score(broken: dict[str, dict[str, Result]]) -> list[str]:
    """How many defences each judge found, flagged and missed, and the defences that AutoAttack overestimates."""
    lines = []
    for judge in ATTACKERS:
        words = [verdicts(each)[judge] for each in broken.values()]
        if asked := len(words) - words.count("-"):
            found, flagged, missed = map(words.count, ("found", "flagged", "missed"))
            lines += [
                "",
                f"`{judge}` judged {asked} defences: it found {found}, flagged {flagged} and missed {missed}.",
            ]
    gaps = {name: overestimated(each, OFFICIAL) for name, each in broken.items()}
    more = {name: gap for name, gap in gaps.items() if gap is not None and gap > CLOSE}
    if more:
        worst = max(more, key=lambda name: more[name])
        lines += [
            "",
            f"AutoAttack overestimates the robust accuracy of {len(more)} of them by more than 2 points, "
            f"and of {worst} by most, {_percent(more[worst])} points.",
        ]
    return lines


def markdown(results: Sequence[Result]) -> list[str]:
    """The tables of broken defences, of the ways to notice failures, of honest and rightly flagged models, of signs.

    Args:
        results: the results so far. A model that nobody has attacked is left out. A judge that has not judged a model
            has a dash.
    """
    every = {name: {one["judge"]: one for one in results if one["model"] == name} for name in ENTRIES}
    every = {name: each for name, each in every.items() if {ADAPTIVE, STANDARD, OFFICIAL} & each.keys()}
    broken = {name: each for name, each in every.items() if ENTRIES[name].paper}
    head = ["images", "clean, %", "truth, %", *ATTACKERS]
    if not every:
        return ["No model has been judged: `python -m benchmarks broken` does it."]
    body = []
    for name, each in broken.items():
        entry, said = ENTRIES[name], verdicts(each)
        words = [said[STANDARD], said[STRONG]]
        body.append([f"{name} ({entry.paper})", entry.attack, entry.published, *_numbers(each), *words])
    says = [f"{judge} says" for judge in (STANDARD, STRONG)]
    lines = markdown_table(["defence", "adaptive attack", "published, %", *head, *says], body)
    lines += _score(broken)
    body = [[name, *_noticed(each)] for name, each in every.items()]
    lines += ["", "What each method says of each model:"]
    lines += ["", *markdown_table(["model", "signs of `standard`", "indicators (Pintor et al.)", "active test"], body)]
    lines += ["", "How many models each method flags, and which models only this method flags:"]
    lines += ["", *_who_notices(every)]
    for title, honest, why in (("honest model", True, []), ("model flagged rightly", False, ["why"])):
        rows = [
            [name, *_numbers(each), *([ENTRIES[name].why] if why else [])]
            for name, each in every.items()
            if not ENTRIES[name].paper and ENTRIES[name].honest == honest
        ]
        if rows:
            lines += ["", *markdown_table([title, *head, *why], rows)]
    lines += ["", "How many models each sign flags, in reports of `standard` and `strong`:"]
    return [*lines, "", *_signs(every)]


def _who_notices(every: dict[str, dict[str, Result]]) -> list[str]:
    """The numbers of models that each way to notice a failed attack flags."""
    body = []
    ways = {STANDARD: "signs of `standard`", PINTOR: "indicators (Pintor et al.)", ACTIVE: "active test"}
    flagged = {
        judge: {name for name, each in every.items() if judge in each and each[judge]["unreliable"]} for judge in ways
    }
    more = {name: overestimated(each, OFFICIAL) for name, each in every.items()}
    for judge, words in ways.items():
        asked = {name for name, each in every.items() if judge in each}
        groups = (
            {name for name in asked if ENTRIES[name].paper},
            {name for name in asked if ENTRIES[name].paper and (more[name] or 0) > CLOSE},
            {name for name in asked if ENTRIES[name].honest},
            {name for name in asked if ENTRIES[name].why},
        )
        counts = [f"{len(flagged[judge] & group)} of {len(group)}" for group in groups]
        others = set[str]().union(*(names for other, names in flagged.items() if other != judge))
        body.append([words, *counts, "; ".join(name for name in every if name in flagged[judge] - others) or "-"])
    groups_told = ["defences", "those that AutoAttack overestimates", "honest models", "models flagged rightly"]
    return markdown_table(["method", *groups_told, "only by this method"], body)


def _signs(every: dict[str, dict[str, Result]]) -> list[str]:
    """The numbers of models that each sign flags, and the models that no other sign of the same report flags."""
    results = [(name, one) for name, each in every.items() for one in each.values()]
    flags = [(name, one["unreliable"]) for name, one in results if one["judge"] in (STANDARD, STRONG)]
    body = []
    for sign in (alarm.name for alarm in ALARMS):
        flagged = {name for name, alarms in flags if sign in alarms}
        alone = dict.fromkeys(name for name, alarms in flags if alarms == [sign])
        counts = [
            sum(bool(test(ENTRIES[name])) for name in flagged)
            for test in (lambda entry: entry.paper, lambda entry: entry.honest, lambda entry: entry.why)
        ]
        body.append([sign, *map(str, counts), "; ".join(alone) or "-"])
    return markdown_table(["sign", "defences", "honest models", "models flagged rightly", "only by this sign"], body)


def table(results: Path) -> list[str]:
    """The tables.

    Args:
        results: the folder ``benchmarks/results``.
    """
    return markdown(rows_of(results / FILE))
