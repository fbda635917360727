"""Run ``python -m benchmarks truth``: count the adversarial examples that AutoAttack and the protocols miss.

A subject is a network or a group of networks, and a contestant is AutoAttack or a protocol. The results file has two
kinds of rows. The row of a subject's truth says for each image whether its ball contains an
adversarial example. The truth is computed once, because it does not depend on attacks. The row of a contestant on a
subject says which images the contestant did not break. This row is computed again if the networks or the attacks have
changed.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from purify_fast._files import write_text
from purify_fast.attacks.base import ball_around, projected
from purify_fast.evaluation import evaluate
from purify_fast.judge.show.text import markdown_table

from ... import kept, options
from ...kept import Row
from ...speed import timing
from ...speed.running import Budget
from .. import revisions
from ..counted_model import CountedModel
from . import exact
from .relu_layers import affine_layers
from .subjects import CONSTRUCTED, EACH, HIDDEN, NETWORKS, SUBJECTS, Part, Setting, hidden, identity, parts_of

FILE = "truth.json"
#: The protocol of each contestant, and the number of seeds with which it attacks the exactly decided networks.
CONTESTANTS = {"AutoAttack": ("official", 1), "fast": ("fast", 3), "standard": ("standard", 3), "strong": ("strong", 1)}
#: The letters for the truth about an image. An image falls if its ball contains an adversarial example. A score
#: includes only robust images and images that fall. The other images are those that fall only in float64, undecided
#: images, misclassified images, and images with a planted corner for which PGD finds an adversarial example.
ROBUST, FALLS, FALLS_IN_FLOAT64, UNDECIDED, WRONG, FOUND_BY_PGD = "rfe?wp"
#: The number of images in a batch, which is the default of AutoAttack.
BATCH = 250
LETTERS = {exact.ROBUST: ROBUST, exact.FALLS: FALLS, exact.UNDECIDED: UNDECIDED}

Results = dict[str, list[Row]]


def read(out: Path) -> Results:
    """Read the rows of the truth and of the contestants. Both lists are empty if there is no results file."""
    path = out / FILE
    return json.loads(path.read_text()) if path.exists() else {"truth": [], "contestants": []}


def key(row: Row) -> tuple[int, int, int]:
    """Return the sort key of a row. No other row of the same kind has this key."""
    who = list(CONTESTANTS).index(row["contestant"]) if "contestant" in row else 0
    return SUBJECTS.index(row["subject"]), who, row.get("seed", 0)


def attacks_of(who: str) -> list[str]:
    """Return the descriptions of a contestant's attacks."""
    return revisions.of_protocol(CONTESTANTS[who][0], random=False)


def outdated(results: Path) -> list[str]:
    """Return a message for each row whose attacks or networks have changed since the row was computed."""
    rows = read(results / "cpu")
    networks = {row["subject"]: row["networks"] for row in rows["truth"]}
    found = []
    for row in rows["contestants"]:
        if row["code"] != {"networks": networks[row["subject"]], "attacks": attacks_of(row["contestant"])}:
            found.append(kept.outdated(FILE, f"{row['contestant']} on {row['subject']!r}", "truth"))
    return found


class Score(NamedTuple):
    """The score of a contestant."""

    falls: int = 0
    missed: int = 0
    contradicted: int = 0


def score(truths: Iterable[Row], rows: Sequence[Row]) -> Score:
    """Compute the score of a contestant over several subjects."""
    left = {row["subject"]: "".join(row["left"]) for row in rows}
    pairs = Counter(
        pair
        for truth in truths
        for pair in zip("".join(truth["verdicts"]), left.get(truth["subject"], ""), strict=False)
    )
    missed = pairs[FALLS, "1"]
    return Score(pairs[FALLS, "0"] + missed, missed, pairs[ROBUST, "0"])


def scores(results: Results, names: Iterable[str]) -> dict[str, list[Score]]:
    """Return the scores of each contestant: one for each seed with which the contestant has attacked all subjects."""
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
    """Return the table of the exactly decided networks, and that of the networks that hide an adversarial example."""
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
    """Return sentences about contradictions to the truth, and the machines."""
    truths = {row["subject"]: row for row in results["truth"]}
    alone = sum("".join(row["verdicts"]).count(FALLS_IN_FLOAT64) for row in truths.values())
    built = [row for row in results["contestants"] if row["subject"] == CONSTRUCTED]
    false = sum(score([truths[CONSTRUCTED]], [row]).contradicted for row in built)
    rows = [row for row in results["contestants"] if row["subject"] in NETWORKS and row["subject"] in truths]
    wrong = sum(score([truths[row["subject"]]], [row]).contradicted for row in rows)
    networks = len(truths[CONSTRUCTED]["verdicts"]) if CONSTRUCTED in truths else 0
    return [
        f"Images that a contestant has broken although they are proved robust: {wrong} on the networks of the first "
        f"of these two tables, and {false} on {networks} networks that are robust by construction. Images that fall in "
        f"float64 and not in float32: {alone}.",
        "",
        f"Measured on: {kept.machines(row for kind in results.values() for row in kind)}.",
    ]


def table(results: Path) -> list[str]:
    """Return the tables for docs/evaluation.md."""
    found = read(results / "cpu")
    if not found["truth"]:
        raise FileNotFoundError(f"{results / 'cpu' / FILE} has no results: run python -m benchmarks truth")
    return markdown(found)


def front(results: Path) -> list[str]:
    """Return the lines of that table about the adversarial examples that each contestant misses."""
    found = read(results / "cpu")
    exact, hidden = (scores(found, names) for names in (NETWORKS, HIDDEN))
    if not all([*exact.values(), *hidden.values()]):
        raise FileNotFoundError(f"{results / 'cpu' / FILE} is incomplete: run python -m benchmarks truth")
    worst = {who: max(one.missed for one in exact[who]) for who in CONTESTANTS}
    recall = {who: 100 - 100 * hidden[who][0].missed / hidden[who][0].falls for who in CONTESTANTS}
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


def decided(part: Part, seconds: float) -> Row:
    """Decide the images of a network. Return for each image a letter for the verdict, and one for the last step."""
    layers = affine_layers(part.model, part.x.shape[1:])
    verdicts, how = "", ""
    for x, y, predicted in zip(part.x, part.y.tolist(), part.model(part.x).argmax(1).tolist(), strict=True):
        if predicted != y:
            verdicts, how = verdicts + WRONG, how + "-"
            continue
        decision = exact.decide(layers, x, y, part.eps, seconds)
        letter = LETTERS[decision.verdict]
        if decision.point is not None:
            point = projected(x[None], decision.point.float().view_as(x)[None], ball_around(x[None], part.eps))
            letter = FALLS_IN_FLOAT64 if int(part.model(point).argmax()) == y else letter
        verdicts, how = verdicts + letter, how + decision.how[0]
    return {"verdicts": [verdicts], "how": [how]}


def write(out: Path, kind: str, row: Row) -> None:
    """Write a row into the results file. If the file has a row with the same key, the new row replaces it."""
    # Read the file here, because another process may have written rows into it.
    results = read(out)
    others = [one for one in results[kind] if key(one) != key(row)]
    results[kind] = sorted([*others, row | timing.environment(torch.device("cpu"))], key=key)
    write_text(out / FILE, json.dumps(results, indent=1) + "\n")


def find(setting: Setting, name: str) -> None:
    """Compute the truth about a subject. Do nothing if the truth about its networks is already known."""
    parts = parts_of(setting, name)
    row = {"subject": name, "networks": identity(parts), "eps": parts[0].eps}
    if any(row.items() <= known.items() for known in read(setting.out)["truth"]):
        return
    if name in NETWORKS:
        row |= decided(parts[0], setting.seconds)
    elif name == CONSTRUCTED:
        row |= {"verdicts": [ROBUST * len(part.y) for part in parts]}
    else:
        first = HIDDEN.index(name) * EACH
        row |= {"verdicts": hidden().verdicts()[first : first + len(parts)]}
    write(setting.out, "truth", row)


def attack(setting: Setting, name: str, who: str, seed: int) -> None:
    """Let a contestant attack the networks of a subject. Networks with a result of the same attacks are skipped."""
    parts = parts_of(setting, name)
    code = {"networks": identity(parts), "attacks": attacks_of(who)}
    row = {"subject": name, "contestant": who, "seed": seed, "code": code}
    row |= {"left": [], "forwards": 0, "gradients": 0}
    for known in read(setting.out)["contestants"]:
        if key(known) == key(row) and known["code"] == code:
            row = known
    settings: dict[str, Any] = {"protocol": CONTESTANTS[who][0], "seed": seed, "batch_size": BATCH, "progress": False}
    for part in parts[len(row["left"]) :]:
        door = CountedModel(part.model)
        robust = evaluate(door, part.x, part.y, eps=part.eps, **settings).headline.robust
        row["left"].append(kept.bits(robust))
        row["forwards"] += door.counts.forwards
        row["gradients"] += door.counts.gradients
        write(setting.out, "contestants", row)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks truth``."""
    options.add_names(parser, SUBJECTS, what="attacked networks")
    options.add_names(parser, CONTESTANTS, "--contestants", "attacks that are tested")
    parser.add_argument("--data", type=Path, help="folder with mnist.npz, or with the official files")
    options.add_out(parser, "/cpu")


def main(chosen: argparse.Namespace) -> str:
    """Compute the rows that are missing or outdated, and return the tables."""
    out = options.out_of(chosen, chosen.quick, "cpu")
    quick = {"images": 4, "seconds": 5.0, "networks": 1} if chosen.quick else {}
    setting, names = Setting(out, chosen.data, **quick), []
    for name in chosen.names:
        try:
            parts_of(setting, name)
            names.append(name)
        except (ValueError, FileNotFoundError) as error:
            print(f"{name} is left out: {error}", flush=True)
    work = [(name, partial(find, setting, name)) for name in names]
    for who in chosen.contestants:
        for name in names:
            # Use one seed for a group of many networks.
            for seed in range(CONTESTANTS[who][1] if name in NETWORKS else 1):
                work.append((f"{name}, {who}, seed {seed}", partial(attack, setting, name, who, seed)))
    Budget().go(work, "row")
    return "\n".join(markdown(read(out)))
