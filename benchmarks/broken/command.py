"""``python -m benchmarks broken``: what AutoAttack, this package's reports and adaptive attacks say of each model.

Every judge of every model is one result in the results file, which is written as soon as the judge is done and not made
again: the command can be interrupted at any time.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from purify_fast._files import write_text
from purify_fast.attacks import APGD, AutoAttack
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation import AttackSpec, evaluate
from purify_fast.evaluation.alarms.signs import ALARMS
from purify_fast.evaluation.show.tables import UNRELIABLE, markdown_table

from .. import RESULTS, options
from ..running import Budget
from . import honest as _honest  # noqa: F401 (with the defences it fills the table of entries)
from .entry import ENTRIES

FILE = "broken.json"
ADAPTIVE, OFFICIAL, STANDARD, STRONG = "adaptive", "AutoAttack", "standard", "strong"
JUDGES = (ADAPTIVE, OFFICIAL, STANDARD, STRONG)
MARK = f" **{UNRELIABLE}**"
#: A report has found what there is to find if it leaves at most so much more than the truth.
CLOSE = 0.02
#: A defence is trained on at most so many images.
TRAINING_IMAGES = 6_000


@functools.cache
def built(name: str, data: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A model, what an adaptive attack follows in its place, and the images and labels to attack."""
    entry = ENTRIES[name]
    images = load_dataset(entry.data, data)
    torch.manual_seed(0)
    made = entry.build(to_float(images.x_train[:TRAINING_IMAGES]), images.y_train[:TRAINING_IMAGES])
    model, followed = made if isinstance(made, tuple) else (made, made)
    return model, followed, to_float(images.x_test[: entry.images]), images.y_test[: entry.images]


def judged(name: str, judge: str, settings: dict[str, int], data: str) -> dict[str, Any]:
    """One result: what a judge leaves of a model, image by image, and what its report says of that.

    Args:
        name: of the model, one of `ENTRIES`.
        judge: one of `JUDGES`.
        settings: "images", at most so many, and "steps" of the attacks that take steps.
        data: the folder of the images.
    """
    entry, (model, followed, x, y) = ENTRIES[name], built(name, data)
    steps, n, begin = settings["steps"], settings["images"], time.process_time()
    how: dict[str, Any] = {"protocol": judge}
    if judge == OFFICIAL:
        how = {"attacks": [AutoAttack(version="rand" if entry.random else "standard", steps=steps)]}
    elif judge == ADAPTIVE:
        targeted = APGD(loss="dlr_targeted", n_target_classes=3 if entry.random else 9)
        source = None if followed is model else followed
        chain = APGD(loss="margin", restarts=2), targeted
        specs = [AttackSpec(attack, gradients_from=source, survivors_only=True) for attack in chain]
        how = {"attacks": specs, "eot_iter": 20}
    report = evaluate(model, x[:n], y[:n], eps=entry.eps, steps=steps, max_forward_batch=1000, progress=False, **how)
    return {
        "model": name, "judge": judge, "settings": settings, "clean": report.row("clean").accuracy,
        "robust": "".join("01"[bool(image)] for image in report.headline.robust),
        "unreliable": [] if report.headline.reliable or "protocol" not in how else
        [one.alarm for one in report.findings if one.verdict == "unreliable"],
        "cpu_seconds": round(time.process_time() - begin, 1),
    }  # fmt: skip


def left(*results: dict[str, Any]) -> float:
    """The share of the images of one model that withstood each of some judges; of all of them, the truth."""
    return statistics.fmean(min(image) == "1" for image in zip(*(one["robust"] for one in results), strict=True))


def verdict(each: dict[str, dict[str, Any]], judge: str) -> str:
    """Whether a judge found what there is to find, or its report flagged that it did not; "-" before it has judged.

    Args:
        each: the results of one model by judge.
        judge: one of `JUDGES`.
    """
    if judge not in each:
        return "-"
    if left(each[judge]) - left(*each.values()) <= CLOSE + 1e-9:
        return "found"
    return "flagged" if each[judge]["unreliable"] else "missed"


def _numbers(each: dict[str, dict[str, Any]]) -> list[str]:
    """How many images, clean accuracy, the truth, and what the three judges leave, in percent."""
    one = each[STANDARD]
    row = [str(len(one["robust"])), f"{100 * one['clean']:.0f}", f"{100 * left(*each.values()):.0f}"]
    for judge in JUDGES[1:]:
        mark = f" **{UNRELIABLE}**" if judge in each and each[judge]["unreliable"] else ""
        row.append(f"{100 * left(each[judge]):.0f}{mark}" if judge in each else "-")
    return row


def markdown(results: Sequence[dict[str, Any]]) -> list[str]:
    """The tables of the broken defences, of the honest models and of the signs.

    Args:
        results: of models and judges; a model that lacks one besides "strong" is left out.
    """
    every = {name: {one["judge"]: one for one in results if one["model"] == name} for name in ENTRIES}
    every = {name: each for name, each in every.items() if {*JUDGES[:3]} <= each.keys()}
    broken = {name: each for name, each in every.items() if ENTRIES[name].paper}
    head, body = ["images", "clean, %", "truth, %", *JUDGES[1:]], []
    for name, each in broken.items():
        sources = [f"{name} ({ENTRIES[name].paper})", ENTRIES[name].attack]
        body.append([*sources, *_numbers(each), verdict(each, STANDARD), verdict(each, STRONG)])
    says = [f"{judge} says" for judge in JUDGES[2:]]
    lines = markdown_table(["defence", "adaptive attack", *head, *says], body)
    for judge in JUDGES[1:]:
        words = [verdict(each, judge) for each in broken.values()]
        counts = ", ".join(f"{words.count(word)} {word}" for word in ("found", "flagged", "missed"))
        lines += ["", f"Of {len(words) - words.count('-')} defences by {judge}: {counts}."]
    body = [[name, *_numbers(each)] for name, each in every.items() if name not in broken]
    lines += ["", *markdown_table(["honest model", *head], body)]
    flags = [(name, one["unreliable"]) for name, each in every.items() for one in each.values()]
    body = []
    for sign, *_ in ALARMS:
        flagged = {name for name, alarms in flags if sign in alarms}
        alone = dict.fromkeys(name for name, alarms in flags if alarms == [sign])
        counts = len(flagged & broken.keys()), len(flagged - broken.keys())
        body.append([sign, *map(str, counts), "; ".join(alone) or "-"])
    return [*lines, "", *markdown_table(["sign", "defences", "honest models", "alone"], body)]


def read(out: Path) -> list[dict[str, Any]]:
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

    Raises:
        FileNotFoundError: nothing has been judged.
    """
    if not (results / FILE).exists():
        raise FileNotFoundError(results / FILE)
    return markdown(read(results))


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks broken``."""
    parser.add_argument("--only", nargs="+", metavar="NAME", type=options.one_of(ENTRIES), help="these models alone")
    parser.add_argument("--redo", nargs="+", choices=JUDGES, default=(), help="these judges once more")
    parser.add_argument("--images", type=options.at_least_one, default=100, help="at most so many; 100 by default")
    parser.add_argument("--data", default="data", help="the folder that holds MNIST and CIFAR-10; data by default")
    parser.add_argument("--quick", action="store_true", help="4 images, 2 steps: that it works, no numbers")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results by default")


def main(chosen: argparse.Namespace) -> str:
    """Judge what is not judged yet; the tables."""
    settings = {"images": 4, "steps": 2} if chosen.quick else {"images": chosen.images, "steps": 100}
    out = chosen.out or (Path("runs/benchmarks") if chosen.quick else RESULTS)
    kept = {(one["model"], one["judge"]): one for one in read(out)}
    asked = [(name, judge) for judge in JUDGES for name in chosen.only or ENTRIES]
    work = [at for at in asked if at[1] in chosen.redo or kept.get(at, {}).get("settings") != settings]

    def run(name: str, judge: str) -> None:
        result = judged(name, judge, settings, chosen.data)
        # read again: another process may judge other models meanwhile
        others = [one for one in read(out) if (one["model"], one["judge"]) != (name, judge)]
        write_text(out / FILE, json.dumps([*others, result], indent=1) + "\n")

    Budget().go([(f"{name}, {judge}", functools.partial(run, name, judge)) for name, judge in work], "result")
    return "\n".join(markdown(read(out)))
