"""The results file of the broken defences, how a result is scored, and the tables that pages take from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purify_fast.evaluation.alarms.signs import ALARMS
from purify_fast.evaluation.show.tables import UNRELIABLE, markdown_table

from . import honest as _honest  # noqa: F401 (each fills the table of entries, the first with the defences)
from . import mistakes as _mistakes  # noqa: F401
from .entry import ENTRIES as ENTRIES

FILE = "broken.json"
ADAPTIVE, OFFICIAL, STANDARD, STRONG = "adaptive", "AutoAttack", "standard", "strong"
PINTOR, ACTIVE = "indicators", "active"
#: In the order in which they judge a model.
JUDGES = (ADAPTIVE, STANDARD, OFFICIAL, PINTOR, ACTIVE, STRONG)
#: The judges that attack and leave images.
ATTACKERS = (OFFICIAL, STANDARD, STRONG)
#: Steps of attacks that leave them open.
STEPS = 100
#: A judge has found what there is to find if it leaves at most so much more than the adaptive attack.
CLOSE = 0.02

_TABLE_1 = "table 1"
#: Where a published figure stands in the paper with the attack, by the entry. Of Athalye et al. the row of the defence
#: in table 1; Guo et al. have one row for all of their transformations. EMPIR is in section 12 of Tramer et al. Carlini
#: and Wagner say in their abstract that the attacks succeed with a probability of 100 %.
SOURCES = {
    "bit-depth reduction": _TABLE_1,
    "total variation minimization": _TABLE_1,
    "JPEG compression": _TABLE_1,
    "random resizing and padding": _TABLE_1,
    "thermometer encoding": _TABLE_1,
    "PixelDefend, by an autoencoder": _TABLE_1,
    "stochastic activation pruning": _TABLE_1,
    "cascade adversarial training": _TABLE_1,
    "EMPIR": "section 12",
    "defensive distillation": "abstract",
}

Result = dict[str, Any]


def published(name: str) -> str:
    """The accuracy that the paper with the attack reports, with its setting and its place there; "-" without a place.

    Args:
        name: of the entry.
    """
    figure = ENTRIES[name].published
    return f"{figure.removesuffix(')')}; {SOURCES[name]})" if name in SOURCES else "-"


def left(result: Result, images: int | None = None) -> float:
    """The share of the first images, or of all, that withstood a judge.

    Args:
        result: of a judge that attacks.
        images: how many; None: all that it attacked.
    """
    return statistics.fmean(image == "1" for image in result["robust"][:images])


def overestimated(each: dict[str, Result], judge: str) -> float | None:
    """By how much a judge leaves more than the adaptive attack, on the images that both attacked; None without both.

    Args:
        each: the results of one model by judge.
        judge: one of `ATTACKERS`.
    """
    if not {judge, ADAPTIVE} <= each.keys():
        return None
    common = min(len(each[judge]["robust"]), len(each[ADAPTIVE]["robust"]))
    return left(each[judge], common) - left(each[ADAPTIVE], common)


def verdicts(each: dict[str, Result]) -> dict[str, str]:
    """Of each judge that attacks, whether it found what there is to find, or its report flagged that it did not.

    Args:
        each: the results of one model by judge. The truth is what the adaptive attack left, and never what others did.

    Returns:
        "found", "flagged", "missed", or "-" where the judge or the adaptive attack has not judged.
    """
    said = {}
    for judge in ATTACKERS:
        more = overestimated(each, judge)
        found = more is not None and more <= CLOSE + 1e-9
        flagged = "flagged" if judge in each and each[judge]["unreliable"] else "missed"
        said[judge] = "-" if more is None else "found" if found else flagged
    return said


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _numbers(each: dict[str, Result]) -> list[str]:
    """How many images, clean accuracy, what the adaptive attack leaves, and what the other judges do, in percent."""
    first = next(each[judge] for judge in (ADAPTIVE, STANDARD, OFFICIAL) if judge in each)
    row = [str(len(first["robust"])), _percent(first["clean"])]
    for judge in (ADAPTIVE, *ATTACKERS):
        cell = "-"
        if judge in each:
            one = each[judge]
            fewer = f" (of {len(one['robust'])})" if len(one["robust"]) < len(first["robust"]) else ""
            cell = _percent(left(one)) + fewer + (f" **{UNRELIABLE}**" if one["unreliable"] else "")
        row.append(cell)
    return row


def _noticed(each: dict[str, Result]) -> list[str]:
    """Which signs of ``standard``, which indicators, and whether the active test say that attacks fail."""
    signs = ", ".join(each[STANDARD]["unreliable"]) or "none" if STANDARD in each else "-"
    indicators = ", ".join(each[PINTOR]["unreliable"]) or "none" if PINTOR in each else "-"
    test = "-"
    if ACTIVE in each:
        one = each[ACTIVE]
        reason = one.get("reason") or "no planted point can be told apart"
        test = f"found {one['found']} of {one['planted']}" if one["planted"] else f"not asked: {reason}"
        test += f" **{UNRELIABLE}**" if one["unreliable"] else ""
    return [signs, indicators, test]


def _score(broken: dict[str, dict[str, Result]]) -> list[str]:
    """How many of the defences each judge found, flagged and missed, and what AutoAttack overestimates."""
    lines = []
    for judge in ATTACKERS:
        words = [verdicts(each)[judge] for each in broken.values()]
        if asked := len(words) - words.count("-"):
            counts = ", ".join(f"{words.count(word)} {word}" for word in ("found", "flagged", "missed"))
            lines += ["", f"`{judge}` on {asked} defences: {counts}."]
    gaps = {name: overestimated(each, OFFICIAL) for name, each in broken.items()}
    more = {name: gap for name, gap in gaps.items() if gap is not None and gap > CLOSE + 1e-9}
    if more:
        worst = max(more, key=lambda name: more[name])
        lines += [
            "",
            f"AutoAttack leaves more than 2 points too much of {len(more)} of them, at most "
            f"{_percent(more[worst])} points ({worst}).",
        ]
    return lines


def markdown(results: Sequence[Result]) -> list[str]:
    """The tables: of the broken defences, of who notices, of the honest models, of those flagged rightly, of the signs.

    Args:
        results: of models and judges, as many as there are. A model that nobody has attacked is left out, and a judge
            that has not judged a model is a dash.
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
        body.append([f"{name} ({entry.paper})", entry.attack, published(name), *_numbers(each), *words])
    says = [f"{judge} says" for judge in (STANDARD, STRONG)]
    lines = markdown_table(["defence", "adaptive attack", "published, %", *head, *says], body)
    lines += _score(broken)
    body = [[name, *_noticed(each)] for name, each in every.items()]
    lines += ["", *markdown_table(["model", "signs of `standard`", "indicators (Pintor et al.)", "active test"], body)]
    lines += ["", *_who_notices(every)]
    for title, chosen in (("honest model", True), ("flagged rightly", False)):
        some = {
            name: each for name, each in every.items() if not ENTRIES[name].paper and ENTRIES[name].honest == chosen
        }
        if some:
            why = [] if chosen else ["why"]
            rows = [[name, *_numbers(each), *([ENTRIES[name].why] if why else [])] for name, each in some.items()]
            lines += ["", *markdown_table([title, *head, *why], rows)]
    return [*lines, "", *_signs(every)]


def _who_notices(every: dict[str, dict[str, Result]]) -> list[str]:
    """How many models each way to notice a failed attack flags: defences, overestimated defences and honest models."""
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
            {name for name in asked if ENTRIES[name].paper and (more[name] or 0) > CLOSE + 1e-9},
            {name for name in asked if ENTRIES[name].honest},
            {name for name in asked if ENTRIES[name].why},
        )
        counts = [f"{len(flagged[judge] & group)} of {len(group)}" for group in groups]
        others = set[str]().union(*(names for other, names in flagged.items() if other != judge))
        body.append([words, *counts, "; ".join(name for name in every if name in flagged[judge] - others) or "-"])
    groups_told = ["defences", "those that AutoAttack overestimates", "honest models", "models flagged rightly"]
    return markdown_table(["who notices", *groups_told, "alone"], body)


def _signs(every: dict[str, dict[str, Result]]) -> list[str]:
    """How many models each sign flags, and which ones no other sign of the same report does."""
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
    return markdown_table(["sign", "defences", "honest models", "models flagged rightly", "the only sign of"], body)


def read(out: Path) -> list[Result]:
    """The results of a folder; none where there is no results file.

    Args:
        out: the folder.
    """
    path = out / FILE
    return json.loads(path.read_text()) if path.exists() else []


def table(results: Path) -> list[str]:
    """The tables, from the folder ``benchmarks/results``.

    Args:
        results: the folder.
    """
    return markdown(read(results))
