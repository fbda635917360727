"""The results file of the exact decisions, its tables, and the sentence of README."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from purify_fast.evaluation.show.tables import markdown_table

from ... import kept
from ...kept import Row
from .. import revisions
from .exact_networks import NETWORKS
from .subjects import CONSTRUCTED, HIDDEN, SUBJECTS

FILE = "truth.json"
#: The protocol of each contestant, and the number of seeds with which it attacks the networks that are decided exactly.
CONTESTANTS = {"AutoAttack": ("official", 1), "fast": ("fast", 3), "standard": ("standard", 3), "strong": ("strong", 1)}
#: The letters for the truth about an image. A score counts only robust images and images that fall. It does not count
#: an image that falls only in float64, an undecided or misclassified image, or a planted image that plain PGD finds.
ROBUST, FALLS, FALLS_IN_FLOAT64, UNDECIDED, WRONG, FOUND_BY_PGD = "rfe?wp"

Results = dict[str, list[Row]]


def read(out: Path) -> Results:
    """The rows of the truth and of the contestants in a folder; none without a results file.

    Args:
        out: the folder.
    """
    path = out / FILE
    return json.loads(path.read_text()) if path.exists() else {"truth": [], "contestants": []}


def key(row: Row) -> tuple[int, int, int]:
    """The place of a row among the rows of its kind, which no other row has."""
    who = list(CONTESTANTS).index(row["contestant"]) if "contestant" in row else 0
    return SUBJECTS.index(row["subject"]), who, row.get("seed", 0)


def outdated(results: Path) -> list[str]:
    """A line for each row that was made by other attacks than the package has, or on other networks than the truth.

    Args:
        results: the folder ``benchmarks/results``.
    """
    rows = read(results / "cpu")
    networks = {row["subject"]: row["networks"] for row in rows["truth"]}
    found = []
    for row in rows["contestants"]:
        attacks = revisions.of_protocol(CONTESTANTS[row["contestant"]][0], random=False)
        if row["code"] != {"networks": networks[row["subject"]], "attacks": attacks}:
            found.append(kept.outdated(FILE, f"{row['contestant']} on {row['subject']!r}", "truth"))
    return found


class Score(NamedTuple):
    """How many images fall, how many of these a contestant left, and how many robust images it broke."""

    falls: int = 0
    missed: int = 0
    contradicted: int = 0


def score(truths: Iterable[Row], rows: Sequence[Row]) -> Score:
    """The score of a contestant over some subjects.

    Args:
        truths: rows of the truth.
        rows: rows of the contestant on these subjects, or on some of them.
    """
    left = {row["subject"]: "".join(row["left"]) for row in rows}
    pairs = Counter(
        pair
        for truth in truths
        for pair in zip("".join(truth["verdicts"]), left.get(truth["subject"], ""), strict=False)
    )
    missed = pairs[FALLS, "1"]
    return Score(pairs[FALLS, "0"] + missed, missed, pairs[ROBUST, "0"])


def scores(results: Results, names: Iterable[str]) -> dict[str, list[Score]]:
    """For each contestant, a score for each seed with which it has attacked all of the subjects.

    Args:
        results: result of `read`.
        names: names of subjects; a subject without a known truth is left out.
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


def _counts(rows: Iterable[Row], column: str, letters: str) -> list[str]:
    """The number of images with each of some letters in a column."""
    text = "".join("".join(row.get(column, ())) for row in rows)
    return [f"{text.count(letter):,}" for letter in letters]


def _groups(results: Results, names: Iterable[str]) -> Iterator[tuple[str, list[Row], list[str]]]:
    """For each subject and for all together: a title, the rows of the truth, and the images that contestants missed."""
    truths = {row["subject"]: row for row in results["truth"] if row["subject"] in names}
    for title, group in (*((name, [name]) for name in names if name in truths), ("all", list(truths))):
        every = scores(results, group).values()
        missed = [", ".join(str(score.missed) for score in seeds) or "-" for seeds in every]
        yield title, [truths[name] for name in group], missed


def markdown(results: Results) -> list[str]:
    """The table of the networks that are decided exactly, and that of the networks that hide a counterexample.

    Args:
        results: result of `read`.
    """
    missed = [f"missed by {who}" for who in CONTESTANTS]
    body = []
    for title, rows, cells in _groups(results, NETWORKS):
        eps = f"{rows[0]['eps']:g}" if title != "all" else ""
        counts = [*_counts(rows, "verdicts", ROBUST + FALLS + UNDECIDED), *_counts(rows, "how", "bpm")]
        body.append([title, eps, *counts, *cells])
    head = ["network", "eps", "robust", "falls", "undecided", "by a bound", "by a point", "by a program", *missed]
    lines = markdown_table(head, body)
    body = []
    for title, rows, cells in _groups(results, HIDDEN):
        count = str(sum(len(row["verdicts"]) for row in rows))
        body.append([title.removeprefix("gap "), count, *_counts(rows, "verdicts", FALLS + FOUND_BY_PGD), *cells])
    head = ["gap, logits", "networks", "hidden from PGD", "found by PGD", *missed]
    return [*lines, "", *markdown_table(head, body), "", *_sentences(results)]


def _sentences(results: Results) -> list[str]:
    """The contradictions of the truth, the costs of each contestant, and the machines."""
    truths = {row["subject"]: row for row in results["truth"]}
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
        f"Images that a contestant has broken although they are proved robust: {wrong} on the networks of the first "
        f"table, and {false} on {networks} networks that are robust by construction. Images that fall in float64 and "
        f"not in float32: {alone}.",
        "",
        f"Forward passes and gradients for each image of the first table: {'; '.join(costs)}.",
        "",
        f"Measured on: {kept.machines(row for kind in results.values() for row in kind)}.",
    ]


def table(results: Path) -> list[str]:
    """The tables.

    Args:
        results: the folder ``benchmarks/results``.

    Raises:
        FileNotFoundError: nothing has been decided.
    """
    found = read(results / "cpu")
    if not found["truth"]:
        raise FileNotFoundError(f"{results / 'cpu' / FILE} holds no decision: run python -m benchmarks truth")
    return markdown(found)


def front(results: Path) -> list[str]:
    """The lines of README's table on the images that fall and are missed by each contestant.

    Args:
        results: the folder ``benchmarks/results``.

    Raises:
        FileNotFoundError: not every subject has been decided and attacked.
    """
    found = read(results / "cpu")
    exact, hidden = (scores(found, names) for names in (NETWORKS, HIDDEN))
    if not all([*exact.values(), *hidden.values()]):
        raise FileNotFoundError(f"{results / 'cpu' / FILE} is not complete: run python -m benchmarks truth")
    worst = {who: max(one.missed for one in seeds) for who, seeds in exact.items()}
    recall = {who: 100 - 100 * seeds[0].missed / seeds[0].falls for who, seeds in hidden.items()}
    decided = sum(int(count.replace(",", "")) for count in _counts(found["truth"], "how", "bpm"))
    missed = ", ".join(f"{who} {count}" for who, count in worst.items())
    shares = ", ".join(f"{who} {share:.0f} %" for who, share in recall.items())
    falls, planted = (every["standard"][0].falls for every in (exact, hidden))
    return [
        f"| {decided:,} images of {len(NETWORKS)} small networks, for which it is proved whether an adversarial "
        f"example exists | It exists for {falls:,} images. An attack with its worst seed misses so many of them: "
        f"{missed}. |\n"
        f"| {planted} adversarial examples that training has hidden from PGD | The attacks find: {shares}. |"
    ]
