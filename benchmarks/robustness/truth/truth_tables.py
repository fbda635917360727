"""The results file of the truth, and the tables and the sentence that pages take from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from purify_fast.evaluation.show.tables import markdown_table

from ...kept import Row, machines
from .. import revisions
from .exact_networks import NETWORKS
from .subjects import CONSTRUCTED, HIDDEN, SUBJECTS

FILE = "truth.json"
#: Who attacks: the protocol, and from how many seeds the networks that are decided exactly are attacked.
CONTESTANTS = {"AutoAttack": ("official", 1), "fast": ("fast", 3), "standard": ("standard", 3), "strong": ("strong", 1)}
#: The truth of an image in one letter. One that falls in float64 and not in the model's float32, and one that is
#: misclassified as it is, count for nobody; nor does a planted one that plain PGD finds.
ROBUST, FALLS, FALLS_IN_FLOAT64, UNDECIDED, WRONG, FOUND_BY_PGD = "rfe?wp"

Results = dict[str, list[Row]]


def read(out: Path) -> Results:
    """The rows of the truth and of the contestants in a folder; none where there is no results file.

    Args:
        out: the folder.
    """
    path = out / FILE
    return json.loads(path.read_text()) if path.exists() else {"truth": [], "contestants": []}


def key(row: Row) -> tuple[int, int, int]:
    """What tells the rows of one kind apart, in the order of the file."""
    who = list(CONTESTANTS).index(row["contestant"]) if "contestant" in row else 0
    return SUBJECTS.index(row["subject"]), who, row.get("seed", 0)


def outdated(results: Path) -> list[str]:
    """Rows that other attacks made than the package has, or that are of other networks than the truth, a line for each.

    Args:
        results: the folder ``benchmarks/results``.
    """
    rows = read(results / "cpu")
    networks = {row["subject"]: row["networks"] for row in rows["truth"]}
    found = []
    for row in rows["contestants"]:
        attacks = revisions.of_protocol(CONTESTANTS[row["contestant"]][0], random=False)
        if row["code"] != {"networks": networks[row["subject"]], "attacks": attacks}:
            found.append(
                f"{FILE}: {row['contestant']} on {row['subject']!r} was made by other attacks than the package has, or "
                "on other networks; run `python -m benchmarks truth`"
            )
    return found


class Score(NamedTuple):
    """How many images fall, how many of these a contestant left, and how many robust ones it fooled the network on."""

    falls: int = 0
    missed: int = 0
    contradicted: int = 0


def score(truths: Iterable[Row], rows: Sequence[Row]) -> Score:
    """The score of one contestant over some subjects.

    Args:
        truths: the rows of the truth.
        rows: of the contestant, on the same subjects or on some of them.
    """
    left = {row["subject"]: "".join(row["left"]) for row in rows}
    pairs = [
        pair
        for truth in truths
        for pair in zip("".join(truth["verdicts"]), left.get(truth["subject"], ""), strict=False)
    ]
    counted = [(FALLS, "0"), (FALLS, "1")], [(FALLS, "1")], [(ROBUST, "0")]
    return Score(*(sum(map(pairs.count, kind)) for kind in counted))


def scores(results: Results, names: Iterable[str]) -> dict[str, list[Score]]:
    """The scores over some subjects, a seed each, of the contestants that have attacked all of them.

    Args:
        results: of `read`.
        names: of the subjects; those whose truth is not known are left out.
    """
    truths = [row for row in results["truth"] if row["subject"] in names]
    whole = {row["subject"]: len(row["verdicts"]) for row in truths}
    found: dict[str, list[Score]] = {who: [] for who in CONTESTANTS}
    for who, (_, seeds) in CONTESTANTS.items():
        for seed in range(seeds):
            rows = [row for row in results["contestants"] if (row["contestant"], row["seed"]) == (who, seed)]
            rows = [row for row in rows if whole.get(row["subject"]) == len(row["left"])]
            if truths and len(rows) == len(truths):
                found[who].append(score(truths, rows))
    return found


def _missed(results: Results, names: Iterable[str]) -> list[str]:
    return [", ".join(str(one.missed) for one in seeds) or "-" for seeds in scores(results, names).values()]


def _counts(rows: Iterable[Row], what: str, letters: str) -> list[str]:
    text = "".join("".join(row.get(what, ())) for row in rows)
    return [f"{text.count(letter):,}" for letter in letters]


def markdown(results: Results) -> list[str]:
    """The tables of the networks that are decided exactly and of those that hide a counterexample.

    Args:
        results: of `read`.
    """
    truths = {row["subject"]: row for row in results["truth"]}
    exact, hidden = ([name for name in names if name in truths] for names in (NETWORKS, HIDDEN))
    missed = [f"missed by {who}" for who in CONTESTANTS]
    body = []
    for title, names in (*((name, [name]) for name in exact), ("all", exact)):
        rows = [truths[name] for name in names]
        eps = f"{rows[0]['eps']:g}" if title != "all" else ""
        counts = [*_counts(rows, "verdicts", ROBUST + FALLS + UNDECIDED), *_counts(rows, "how", "bpm")]
        body.append([title, eps, *counts, *_missed(results, names)])
    head = ["network", "eps", "robust", "falls", "undecided", "by a bound", "by a point", "by a program", *missed]
    lines = markdown_table(head, body)
    body = []
    for title, names in (*((name.removeprefix("gap "), [name]) for name in hidden), ("all", hidden)):
        rows = [truths[name] for name in names]
        counts = _counts(rows, "verdicts", FALLS + FOUND_BY_PGD)
        body.append([title, str(sum(len(row["verdicts"]) for row in rows)), *counts, *_missed(results, names)])
    head = ["gap, logits", "networks", "hidden from PGD", "found by PGD", *missed]
    return [*lines, "", *markdown_table(head, body), "", *_sentences(results, truths)]


def _sentences(results: Results, truths: dict[str, Row]) -> list[str]:
    """Who contradicts the truth, what each contestant costs, and on which machines."""
    alone = sum("".join(row["verdicts"]).count(FALLS_IN_FLOAT64) for row in truths.values())
    built = [row for row in results["contestants"] if row["subject"] == CONSTRUCTED]
    false = sum(score([truths[CONSTRUCTED]], [row]).contradicted for row in built)
    rows = [row for row in results["contestants"] if row["subject"] in NETWORKS and row["subject"] in truths]
    wrong = sum(score([truths[row["subject"]]], [row]).contradicted for row in rows)
    costs = []
    for who in CONTESTANTS:
        own = [row for row in rows if row["contestant"] == who]
        if images := sum(len(part) for row in own for part in row["left"]):
            forwards, gradients = (sum(row[what] for row in own) / images for what in ("forwards", "gradients"))
            costs.append(f"{who} {forwards:,.0f} and {gradients:,.0f}")
    networks = len(truths[CONSTRUCTED]["verdicts"]) if CONSTRUCTED in truths else 0
    return [
        f"Images that a contestant has broken although they are proved robust: {wrong}; on {networks} networks that "
        f"are robust by construction: {false}. Images that fall in float64 and not in float32: {alone}.",
        "",
        f"Forward passes and gradients an image on the networks of the first table: {'; '.join(costs)}.",
        "",
        f"{machines(row for kind in results.values() for row in kind)}.",
    ]


def table(results: Path) -> list[str]:
    """The tables, from the folder ``benchmarks/results``.

    Args:
        results: the folder.

    Raises:
        FileNotFoundError: nothing has been decided.
    """
    found = read(results / "cpu")
    if not found["truth"]:
        raise FileNotFoundError(results / "cpu" / FILE)
    return markdown(found)


def front(results: Path) -> list[str]:
    """The sentence of README: how many images that fall each contestant misses.

    Args:
        results: the folder ``benchmarks/results``.

    Raises:
        FileNotFoundError: not every subject has been decided and attacked.
    """
    found = read(results / "cpu")
    exact, hidden = (scores(found, names) for names in (NETWORKS, HIDDEN))
    if not all([*exact.values(), *hidden.values()]):
        raise FileNotFoundError(results / "cpu" / FILE)
    worst = {who: max(one.missed for one in seeds) for who, seeds in exact.items()}
    recall = {who: 100 - 100 * seeds[0].missed / seeds[0].falls for who, seeds in hidden.items()}
    decided = sum(int(count.replace(",", "")) for count in _counts(found["truth"], "how", "bpm"))
    missed = ", ".join(f"{who} {count}" for who, count in worst.items())
    shares = ", ".join(f"{who} {share:.0f} %" for who, share in recall.items())
    falls, planted = (every["standard"][0].falls for every in (exact, hidden))
    return [
        f"For {decided:,} images of {len(NETWORKS)} small networks the truth is known exactly. {falls:,} of them fall, "
        f"and from the worst seed the attacks miss: {missed}. {planted} counterexamples were hidden from PGD by "
        f"training, and the attacks find: {shares}."
    ]
