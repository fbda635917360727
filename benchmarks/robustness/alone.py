"""Count for each attack of the protocol ``standard`` how many images fall to this attack alone.

The protocol runs first. Each image that falls is then attacked again by all other attacks of the protocol, each from
its start to its end. The image has fallen to an attack *alone* if it withstands all these other attacks. So an attack
that no image needs has the count 0 everywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purify_fast._files import write_text
from purify_fast._tensors import weights_fingerprint
from purify_fast.attacks.base import ThreatModel
from purify_fast.evaluation import AttackSpec, EvaluateConfig, evaluate
from purify_fast.evaluation.request import subject as evaluated
from purify_fast.evaluation.request.attack_lists import protocol_attacks
from purify_fast.evaluation.show.text import markdown_table

from .. import kept, options
from ..kept import Row
from ..speed import timing
from . import revisions
from .contests import BATCH, CONTESTS, OURS, ROBUST, Subject

#: The results file, and the file with the table for docs/evaluation.md.
FILE, TABLE = "alone.json", "alone.md"
ALL = {name: contest for name, contest in (CONTESTS | ROBUST).items() if not contest.random}


def withstood(subject: Subject, attacks: list[AttackSpec]) -> list[tuple[str, Tensor]]:
    """Return each attack's name, and which images withstood it and all before, bool ``[N]``; the clean images are
    first.
    """
    config = EvaluateConfig(batch_size=BATCH, probes=False)
    how: dict[str, Any] = {"eps": subject.eps, "config": config, "attacks": attacks, "progress": False}
    rows = evaluate(subject.model, subject.x, subject.y, **how).rows[: 1 + len(attacks)]
    return [(row.attack, torch.from_numpy(row.robust)) for row in rows]


def found(subject: Subject) -> Iterator[tuple[str, int, int]]:
    """Yield for each attack of the protocol its name, how many images fell to it, and how many fell to it alone."""
    whole = evaluated.Subject(subject.model, subject.x, subject.y, batch_size=BATCH, n_eval=1, seed=0)
    attacks = protocol_attacks(OURS, whole, ThreatModel("linf", subject.eps))
    every = [replace(spec, until=None, nearest=None) for spec in attacks]
    left = withstood(subject, attacks)
    for number, (_, before) in enumerate(left[:-1]):
        name, after = left[number + 1]
        fell = (before & ~after).nonzero()[:, 0]
        alone = torch.zeros(0)
        if len(fell):
            again = replace(subject, x=subject.x[fell], y=subject.y[fell])
            alone = withstood(again, [*every[:number], *every[number + 1 :]])[-1][1]
        yield name, len(fell), int(alone.sum())


def markdown(rows: list[Row]) -> list[str]:
    """Return the table: a row for each attack, with the sums over all contests."""
    names = list(dict.fromkeys(name for row in rows for name in row["attacks"]))
    body = []
    for name in names:
        cells = [row["attacks"].get(name, [0, 0]) for row in rows]
        alone = [f"{row['contest']}: {cell[1]}" for row, cell in zip(rows, cells, strict=True) if cell[1]]
        sums = [str(sum(column)) for column in zip(*cells, strict=True)]
        body.append([name, *sums, "; ".join(alone)])
    contests = "; ".join(f"{row['contest']} ({row['images']} images)" for row in rows)
    head = ["attack", "fell to it first", "fell to it alone", "contests with such images"]
    return [f"Contests: {contests}.", "", *markdown_table(head, body)]


def outdated(results: Path) -> list[str]:
    """Return a message for each row that was made with other attacks than the protocol has now."""
    now = revisions.short(OURS, random=False)
    rows = [row for row in kept.rows_of(results / "studies" / FILE) if row.get("revision") != now]
    return [kept.outdated(FILE, repr(row["contest"]), f"alone '{row['contest']}'") for row in rows]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks alone``."""
    options.add_names(parser, ALL, what="contests to run")
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz and mnist.npz, or with the official files")
    parser.add_argument("--images", type=int, help="largest number of images of a contest; default: all images")
    options.add_out(parser, "/studies")


def main(chosen: argparse.Namespace) -> str:
    """Run contests, and return the table."""
    out = options.out_of(chosen, chosen.quick, "studies")
    most = 4 if chosen.quick else chosen.images
    for name in chosen.names:
        subject = ALL[name].make(chosen.data)
        subject = replace(subject, x=subject.x[:most], y=subject.y[:most])
        row: Row = {"contest": name, "images": len(subject.x), "weights": weights_fingerprint(subject.model)}
        row["revision"] = revisions.short(OURS, random=False)
        row |= {"attacks": {attack: counts for attack, *counts in found(subject)}}
        row |= timing.environment(torch.device("cpu"))
        kept.put(out / FILE, row, lambda one: list(ALL).index(one["contest"]))
        print(json.dumps(row["attacks"]), flush=True)
        write_text(out / TABLE, "\n".join(markdown(kept.rows_of(out / FILE))) + "\n")
    return (out / TABLE).read_text()
