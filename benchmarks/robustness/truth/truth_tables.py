"""Read the results of the exact decisions, and make the tables for docs/evaluation.md and README."""

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
#: The protocol of each contestant, and the number of seeds with which it attacks the exactly decided networks.
CONTESTANTS = {"AutoAttack": ("official", 1), "fast": ("fast", 3), "standard": ("standard", 3), "strong": ("strong", 1)}
#: The letters for the truth about an image. An image falls if its ball contains an adversarial example. A score
#: includes only robust images and images that fall. The other images are those that fall only in float64, undecided
#: images, misclassified images, and images with a planted corner for which PGD finds an adversarial example.
ROBUST, FALLS, FALLS_IN_FLOAT64, UNDECIDED, WRONG, FOUND_BY_PGD = "rfe?wp"

Results = dict[str, list[Row]]


def read(out: Path) -> Results:
    """Read the rows of the truth and of the contestants. Both lists are empty if there is no results file.

    Args:
        out: folder of the results.
    """
    path = out / FILE
    return json.loads(path.read_text()) if path.exists() else {"truth": [], "contestants": []}


def key(row: Row) -> tuple[int, int, int]:
    """Return the sort key of a row. No other row of the same kind has this key."""
    who = list(CONTESTANTS).index(row["contestant"]) if "contestant" in row else 0
    return SUBJECTS.index(row["subject"]), who, row.get("seed", 0)


def outdated(results: Path) -> list[str]:
    """Return a message for each row whose attacks or networks have changed since the row was computed.

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
    """The score of a contestant.

    Attributes:
        falls: number of attacked images whose ball contains an adversarial example.
        missed: number of these images for which the contestant found no adversarial example.
        contradicted: number of robust images for which the contestant reports an adversarial example. This number must
            be 0.
    """

    falls: int = 0
    missed: int = 0
    contradicted: int = 0


def score(truths: Iterable[Row], rows: Sequence[Row]) -> Score:
    """Compute the score of a contestant over several subjects.

    Args:
        truths: rows of the truth about the subjects.
        rows: rows of the contestant on all or some of the subjects.
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
    """Return the scores of each contestant: a score for each seed with which the contestant has attacked all subjects.

    Args:
        results: result of `read`.
        names: names of subjects. A subject without a row of the truth is left out.
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
    """Return, for each of the letters, the number of its occurrences in a column, as table cells."""
    text = "".join("".join(row.get(column, ())) for row in rows)
    return [f"{text.count(letter):,}" for letter in letters]


def _groups(results: Results, names: Iterable[str]) -> Iterator[tuple[str, list[Row], list[str]]]:
    """Yield a title, the rows of the truth, and the numbers of missed images, for each subject and for all together."""
    truths = {row["subject"]: row for row in results["truth"] if row["subject"] in names}
    for title, group in (*((name, [name]) for name in names if name in truths), ("all", list(truths))):
        every = scores(results, group).values()
        missed = [", ".join(str(score.missed) for score in seeds) or "-" for seeds in every]
        yield title, [truths[name] for name in group], missed


def markdown(results: Results) -> list[str]:
    """Return the table of the exactly decided networks, and that of the networks that hide an adversarial example.

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
    """Return sentences about contradictions to the truth, the work of each contestant, and the machines."""
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
        f"of these two tables, and {false} on {networks} networks that are robust by construction. Images that fall in "
        f"float64 and not in float32: {alone}.",
        "",
        f"Forward passes and gradients for each image of the first of these two tables: {'; '.join(costs)}.",
        "",
        f"Measured on: {kept.machines(row for kind in results.values() for row in kind)}.",
    ]


def table(results: Path) -> list[str]:
    """Return the tables for docs/evaluation.md.

    Args:
        results: the folder ``benchmarks/results``.

    Raises:
        FileNotFoundError: no image has been decided.
    """
    found = read(results / "cpu")
    if not found["truth"]:
        raise FileNotFoundError(f"{results / 'cpu' / FILE} has no results: run python -m benchmarks truth")
    return markdown(found)


def front(results: Path) -> list[str]:
    """Return the lines of README's table about the adversarial examples that each contestant misses.

    Args:
        results: the folder ``benchmarks/results``.

    Raises:
        FileNotFoundError: results on some subjects are missing.
    """
    found = read(results / "cpu")
    exact, hidden = (scores(found, names) for names in (NETWORKS, HIDDEN))
    if not all([*exact.values(), *hidden.values()]):
        raise FileNotFoundError(f"{results / 'cpu' / FILE} is incomplete: run python -m benchmarks truth")
    worst = {who: max(one.missed for one in seeds) for who, seeds in exact.items()}
    recall = {who: 100 - 100 * seeds[0].missed / seeds[0].falls for who, seeds in hidden.items()}
    decided = sum(int(count.replace(",", "")) for count in _counts(found["truth"], "how", "bpm"))
    missed = ", ".join(f"{who} {count}" for who, count in worst.items())
    shares = ", ".join(f"{who} {share:.0f} %" for who, share in recall.items())
    falls, planted = (every["standard"][0].falls for every in (exact, hidden))
    return [
        f"| {decided:,} images of {len(NETWORKS)} small networks; for each image it is proved whether an adversarial "
        f"example exists | An adversarial example exists for {falls:,} images. Number of these images that an attack "
        f"misses with its worst seed: {missed}. |\n"
        f"| {planted} adversarial examples that were hidden from PGD by training | Share of these examples that an "
        f"attack finds: {shares}. |"
    ]
