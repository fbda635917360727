"""Run ``python -m benchmarks broken``: several judges evaluate broken defences and robust models.

A judge is AutoAttack, a protocol of this package, or an adaptive attack. A result is saved as soon as it is computed,
with hashes of its code, and computed again if they have changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from purify_fast import zoo
from purify_fast._settings import text_hash, weights_fingerprint
from purify_fast.attacks import OriginalAutoAttack
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation import AttackSpec, EvaluateConfig, evaluate
from purify_fast.judge.alarms import signs
from purify_fast.judge.show.text import UNRELIABLE, markdown_table

from ... import kept, options
from ...kept import Row, put, rows_of
from ...speed.running import Budget
from .. import revisions
from . import (
    adaptive,
    honest as _honest,  # noqa: F401
    mistakes as _mistakes,  # noqa: F401
)
from .entry import ENTRIES as ENTRIES, Entry

FILE = "broken.json"
ADAPTIVE, OFFICIAL, STANDARD, STRONG = "adaptive", "AutoAttack", "standard", "strong"
#: The judges, in the order in which they evaluate a model.
JUDGES = (ADAPTIVE, STANDARD, OFFICIAL, STRONG)
#: The judges that are compared with the adaptive attack.
ATTACKERS = (OFFICIAL, STANDARD, STRONG)
#: The number of steps of an attack that does not set a number itself.
STEPS = 100
#: A judge that exceeds the adaptive attack by at most this share has found the weakness; 1e-9 is for rounding.
CLOSE = 0.02 + 1e-9


def left(result: Row, images: int | None = None) -> float:
    """Return the robust accuracy in a result."""
    return statistics.fmean(image == "1" for image in result["robust"][:images])


def overestimated(each: dict[str, Row], judge: str) -> float | None:
    """Return a judge's robust accuracy minus the adaptive attack's, on the images of both; None without results."""
    if not {judge, ADAPTIVE} <= each.keys():
        return None
    common = min(len(each[judge]["robust"]), len(each[ADAPTIVE]["robust"]))
    return left(each[judge], common) - left(each[ADAPTIVE], common)


def verdicts(each: dict[str, Row]) -> dict[str, str]:
    """Compare the judges in `ATTACKERS` with the adaptive attack on a model. Return a verdict for each judge.

    It is "found" if the judge's robust accuracy is close to that of the adaptive attack, "flagged" if this accuracy is
    higher but the judge calls it unreliable, "missed" otherwise, and "-" if one of the two has no result.
    """
    said = {}
    for judge in ATTACKERS:
        more = overestimated(each, judge)
        flagged = "flagged" if judge in each and each[judge]["unreliable"] else "missed"
        said[judge] = "-" if more is None else "found" if more <= CLOSE else flagged
    return said


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _numbers(each: dict[str, Row]) -> list[str]:
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


def _score(broken: dict[str, dict[str, Row]]) -> str:
    """Return sentences that count the verdicts of each judge."""
    sentences = []
    for judge in ATTACKERS:
        said = [verdicts(each)[judge] for each in broken.values()]
        if asked := len(said) - said.count("-"):
            found, flagged, missed = map(said.count, ("found", "flagged", "missed"))
            words = f"`{judge}` judged {asked} defences: it found {found} weaknesses"
            sentences.append(f"{words}, flagged {flagged} defences, and missed {missed} weaknesses.")
    return " ".join(sentences)


def markdown(results: Sequence[Row]) -> list[str]:
    """Return all tables for docs/judge_reference.md."""
    every = {name: {one["judge"]: one for one in results if one["model"] == name} for name in ENTRIES}
    every = {name: each for name, each in every.items() if {ADAPTIVE, STANDARD, OFFICIAL} & each.keys()}
    broken = {name: each for name, each in every.items() if ENTRIES[name].paper}
    head = ["images", "clean, %", "adaptive, %", *ATTACKERS]
    body = []
    for name, each in broken.items():
        entry, said = ENTRIES[name], verdicts(each)
        words = [said[STANDARD], said[STRONG]]
        body.append([f"{name} ({entry.paper})", entry.attack, entry.published, *_numbers(each), *words])
    says = [f"{judge} says" for judge in (STANDARD, STRONG)]
    lines = markdown_table(["defence", "adaptive attack", "published, %", *head, *says], body)
    lines += ["", f"{_score(broken)} {_signs(every)}"]
    for title, honest, why in (("honest model", True, []), ("model with a fault", False, ["why"])):
        rows = [
            [name, *_numbers(each), *([ENTRIES[name].why] if why else [])]
            for name, each in every.items()
            if not ENTRIES[name].paper and ENTRIES[name].honest == honest
        ]
        if rows:
            lines += ["", *markdown_table([title, *head, *why], rows)]
    return lines


def _signs(every: dict[str, dict[str, Row]]) -> str:
    """Return a sentence that counts the models that the signs of the protocol ``standard`` flag."""
    judged = {name: bool(each[STANDARD]["unreliable"]) for name, each in every.items() if STANDARD in each}
    broken = [name for name in judged if ENTRIES[name].paper]
    groups = {
        "defences": broken,
        "defences that AutoAttack overestimates": [
            n for n in broken if (overestimated(every[n], OFFICIAL) or 0) > CLOSE
        ],
        "honest models": [name for name in judged if ENTRIES[name].honest],
        "models with a fault": [name for name in judged if ENTRIES[name].why],
    }
    counts = [f"{sum(judged[name] for name in names)} of {len(names)} {kind}" for kind, names in groups.items()]
    return f"The signs of `standard` flag {', '.join(counts[:-1])}, and {counts[-1]}."


def table(results: Path) -> list[str]:
    """Return all tables of the committed results."""
    return markdown(rows_of(results / FILE))


#: The largest number of images on which a defence is trained.
TRAINING_IMAGES = 6_000
#: The draws of a step of an adaptive attack that sets none, and the most images that the protocol `STRONG` attacks.
DRAWS, STRONG_IMAGES = adaptive.DRAWS, 50


@functools.cache
def built(name: str, data: str) -> tuple[tuple[nn.Module, ...], Tensor, Tensor]:
    """Build a model, and return a tuple of models, the images and the labels. The first of the models is attacked."""
    entry = ENTRIES[name]
    images = load_dataset(entry.data, data)
    torch.manual_seed(0)
    made = entry.build(to_float(images.x_train[:TRAINING_IMAGES]), images.y_train[:TRAINING_IMAGES])
    models = made if isinstance(made, tuple) else (made,)
    return models, to_float(images.x_test[: entry.images]), images.y_test[: entry.images]


def judged(name: str, judge: str, settings: dict[str, int], data: str) -> Row:
    """Let a judge evaluate a model. The result has the robust images, and the signs of a failed attack."""
    entry, (models, x, y) = ENTRIES[name], built(name, data)
    begin = time.process_time()
    steps, n = settings["steps"], settings["images"]
    how: dict[str, Any] = {"steps": steps, "config": EvaluateConfig(max_forward_batch=1000)}
    if judge == OFFICIAL:
        how |= {"attacks": [OriginalAutoAttack(version="rand" if entry.random else "standard", steps=steps)]}
    elif judge == ADAPTIVE:
        specs = adaptive.specs(entry, (None, *models[1:]))
        if steps < STEPS:
            short = {"steps": steps, "restarts": 1}
            specs = [dataclasses.replace(spec, attack=dataclasses.replace(spec.attack, **short)) for spec in specs]
        how |= {"attacks": specs, "eot_iter": DRAWS}
    else:
        how |= {"protocol": judge}
    report = evaluate(models[0], x[:n], y[:n], eps=entry.eps, progress=False, **how)
    flags = [one.alarm for one in report.findings if one.beside_headline]
    return {
        "model": name,
        "judge": judge,
        "settings": settings,
        "clean": report.row("clean").accuracy,
        "robust": kept.bits(report.headline.robust),
        "unreliable": flags if "protocol" in how else [],
        "code": code(name, judge),
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


def settings_of(name: str, judge: str, chosen: argparse.Namespace) -> dict[str, int]:
    """Return the largest numbers of images and steps with which a judge evaluates a model."""
    most = min(ENTRIES[name].images, STRONG_IMAGES) if judge == STRONG else ENTRIES[name].images
    return {"images": min(4, most), "steps": 2} if chosen.quick else {"images": most, "steps": STEPS}


def order(work: tuple[str, str]) -> tuple[bool, int, int]:
    """Return the sort key of a result. Deterministic models of digits come first, and the judge `STRONG` comes last."""
    name, judge = work
    entry = ENTRIES[name]
    return judge == STRONG, entry.random + 2 * (entry.data != "digits"), JUDGES.index(judge)


#: Increase this number if a change in this folder changes results: older saved results are then computed again.
REVISION = 1
#: The files that make the models: any change of them, also of a comment, outdates the results of all models.
SOURCES = ("defences.py", "entry.py", "honest.py", "mistakes.py")


def code(name: str, judge: str) -> dict[str, str]:
    """Return short hashes of the code that makes a result."""
    entry = ENTRIES[name]
    # The names of the zoo's models stand in backquotes. Their classes promise other draws for each image.
    rule = revisions.of_rule(entry.random, probes=judge in (STANDARD, STRONG), promised=name.startswith("`"))
    words = [f"{REVISION}", *_of_judge(entry, judge), *rule]
    return {"model": _of_models(), "judge": _short("\n".join(words))}


def _short(text: str) -> str:
    return text_hash(text).hexdigest()[:12]


def _of_judge(entry: Entry, judge: str) -> list[str]:
    if judge == OFFICIAL:
        spec = AttackSpec(OriginalAutoAttack(version="rand" if entry.random else "standard"))
        return revisions.of_attacks([spec])
    if judge == ADAPTIVE:
        specs = adaptive.specs(entry, [None] * 10)
        follows = [str(part.follows) for part in adaptive.chain(entry)]
        return [*revisions.of_attacks(specs), *follows]
    # A protocol that finds signs of masked gradients also attacks surrogates, so include their revision and the limits.
    return [*revisions.of_protocol(judge, entry.random), f"surrogates {revisions.SURROGATES}", *_of_signs()]


def _of_signs() -> list[str]:
    """Return the names of the report's signs, and the constants that decide whether a sign fails."""
    values = {name: value for name, value in vars(signs).items() if name.isupper()}
    limits = [f"{name} {value}" for name, value in values.items() if isinstance(value, int | float)]
    return [*(alarm.name for alarm in signs.ALARMS), *sorted(limits)]


@functools.cache
def _of_models() -> str:
    """Return a hash of the source files that make the models, and of the weights of the zoo's models that they name."""
    text = "\n".join(Path(__file__).with_name(file).read_text() for file in SOURCES)
    words = set(text.replace("'", '"').split('"'))
    with torch.random.fork_rng([]):
        weights = [f"{name} {weights_fingerprint(zoo.load(name))}" for name in zoo.list() if name in words]
    return _short("\n".join([text, *weights]))


def outdated(results: Path) -> list[str]:
    """Return a message for each result whose code has changed since it was computed."""
    return [
        kept.outdated(FILE, f"{one['judge']} of {one['model']!r}", "broken")
        for one in rows_of(results / FILE)
        if one["model"] not in ENTRIES or one["code"] != code(one["model"], one["judge"])
    ]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks broken``."""
    options.add_names(parser, ENTRIES, "--only", "models that are evaluated")
    parser.add_argument("--data", default="data", help="folder with MNIST and CIFAR-10; default: data")
    options.add_out(parser, "")


def main(chosen: argparse.Namespace) -> str:
    """Compute the results that are missing or outdated, and return the tables."""
    out = options.out_of(chosen, chosen.quick, "")
    known = {(one["model"], one["judge"]): one for one in rows_of(out / FILE)}

    def is_done(name: str, judge: str) -> bool:
        old = known.get((name, judge), {})
        as_asked = old.get("settings") == settings_of(name, judge, chosen)
        return as_asked and old.get("code") == code(name, judge)

    asked = [(name, judge) for judge in JUDGES for name in chosen.only]
    work = sorted((at for at in asked if not is_done(*at)), key=order)

    def run(name: str, judge: str) -> None:
        each = {one["judge"]: one for one in rows_of(out / FILE) if one["model"] == name}
        # `STRONG` evaluates a model only if ``standard`` found its weakness or flagged it.
        if judge != STRONG or verdicts(each)[STANDARD] in ("found", "flagged"):
            result = judged(name, judge, settings_of(name, judge, chosen), chosen.data)
            put(out / FILE, result, key=itemgetter("model", "judge"))

    Budget().go([(f"{name}, {judge}", functools.partial(run, name, judge)) for name, judge in work], "result")
    return "\n".join(markdown(rows_of(out / FILE)))
