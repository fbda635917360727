"""``python -m benchmarks broken``: AutoAttack, this package's reports and adaptive attacks judge each model.

A judge's result on a model is written to the results file at once and not made again, so the command can be interrupted
at any time. A result names the code that made it. It is made again if the model, the attacks or the signs have changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from purify_fast.attacks import AutoAttack
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation import AttackSpec, EvaluateConfig, evaluate

from ... import options
from ...kept import put, rows_of
from ...speed.running import Budget
from . import active, adaptive, broken_tables, pintor
from .broken_tables import ACTIVE, ADAPTIVE, ENTRIES, FILE, JUDGES, OFFICIAL, PINTOR, STRONG, Result, verdicts
from .code import code

#: A defence is trained on at most this many images.
TRAINING_IMAGES = 6_000
#: An adaptive attack averages DRAWS draws if it sets no number. `STRONG` judges at most STRONG_IMAGES images.
DRAWS, STRONG_IMAGES = adaptive.DRAWS, 50


@functools.cache
def built(name: str, data: str) -> tuple[tuple[nn.Module, ...], Tensor, Tensor]:
    """The deployed model with the others that its adaptive attack follows, and the images and labels to attack."""
    entry = ENTRIES[name]
    images = load_dataset(entry.data, data)
    torch.manual_seed(0)
    made = entry.build(to_float(images.x_train[:TRAINING_IMAGES]), images.y_train[:TRAINING_IMAGES])
    models = made if isinstance(made, tuple) else (made,)
    return models, to_float(images.x_test[: entry.images]), images.y_test[: entry.images]


def judged(name: str, judge: str, settings: dict[str, int], data: str) -> Result:
    """The result of a judge on a model: the images that withstand, or its findings on the attacks.

    Args:
        name: name in `ENTRIES`.
        judge: name in `JUDGES`.
        settings: the largest numbers of "images" and of "steps".
        data: the folder of the images.
    """
    entry, (models, x, y) = ENTRIES[name], built(name, data)
    n, begin = settings["images"], time.process_time()
    result: Result = {"model": name, "judge": judge, "settings": settings}
    if judge == PINTOR:
        n = min(n, pintor.IMAGES)
        found: Any = pintor.indicators(models[0], x[:n], y[:n], entry.eps)
        result |= {"indicators": found, "unreliable": pintor.fired(found)}
    elif judge == ACTIVE:
        found = active.power(models[0], x[:n], y[:n], entry.eps)
        result |= dataclasses.asdict(found) | {"unreliable": ["active test"] if found.unreliable else []}
    else:
        result |= _attacked(name, judge, settings, data)
    return result | {"code": code(name, judge), "cpu_seconds": round(time.process_time() - begin, 1)}


def _attacked(name: str, judge: str, settings: dict[str, int], data: str) -> Result:
    """The facts of a report on a model: clean accuracy, the images that withstand, and the signs of a failed attack."""
    entry, (models, x, y) = ENTRIES[name], built(name, data)
    steps, n = settings["steps"], settings["images"]
    shared = EvaluateConfig(steps=steps, max_forward_batch=1000)
    config, how = shared, dict[str, Any]()
    if judge == OFFICIAL:
        how = {"attacks": [AutoAttack(version="rand" if entry.random else "standard", steps=steps)]}
    elif judge == ADAPTIVE:
        how = {"attacks": [_shortened(spec, steps) for spec in adaptive.specs(entry, (None, *models[1:]))]}
        config = dataclasses.replace(shared, eot_iter=DRAWS)
    else:
        config = dataclasses.replace(shared, protocol=judge)
    report = evaluate(models[0], x[:n], y[:n], eps=entry.eps, config=config, progress=False, **how)
    flags = [one.alarm for one in report.findings if one.beside_headline]
    return {
        "clean": report.row("clean").accuracy,
        "robust": "".join("01"[bool(image)] for image in report.headline.robust),
        "unreliable": flags if config.protocol is not None else [],
    }


def _shortened(spec: AttackSpec, steps: int) -> AttackSpec:
    """A part of an adaptive attack with at most this number of steps, if it is a trial's."""
    attack: Any = spec.resolved
    if steps >= broken_tables.STEPS:
        return spec
    return dataclasses.replace(spec, attack=dataclasses.replace(attack, steps=min(steps, attack.steps), restarts=1))


def settings_of(name: str, judge: str, chosen: argparse.Namespace) -> dict[str, int]:
    """The settings of a judge's result.

    Args:
        name: name of the model.
        judge: name of the judge.
        chosen: the options of the command.
    """
    most = min(ENTRIES[name].images, chosen.images or ENTRIES[name].images)
    most = min(most, STRONG_IMAGES) if judge == STRONG else most
    return {"images": min(4, most), "steps": 2} if chosen.quick else {"images": most, "steps": broken_tables.STEPS}


def order(work: tuple[str, str]) -> tuple[bool, int, int]:
    """The place of a result among others: deterministic models of digits come first, and `STRONG` comes last.

    Args:
        work: the model and the judge.
    """
    name, judge = work
    entry = ENTRIES[name]
    return judge == STRONG, entry.random + 2 * (entry.data != "digits"), JUDGES.index(judge)


def is_asked(name: str, judge: str, results: list[Result]) -> bool:
    """Tell whether a judge judges a model: `STRONG` does so only if ``standard`` found enough, or flagged the model.

    Args:
        name: name of the model.
        judge: name of the judge.
        results: the results so far.
    """
    if judge != STRONG:
        return True
    each = {one["judge"]: one for one in results if one["model"] == name}
    return verdicts(each)[broken_tables.STANDARD] in ("found", "flagged")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks broken``."""
    options.add_names(parser, ENTRIES, "--only", "which models")
    options.add_names(parser, JUDGES, "--judges", "who judges")
    parser.add_argument("--redo", nargs="+", choices=JUDGES, default=(), help="judges whose results are made once more")
    parser.add_argument("--images", type=options.at_least_one, help="the most images of a model; all by default")
    options.add_minutes(parser)
    parser.add_argument("--data", default="data", help="the folder that holds MNIST and CIFAR-10; data by default")
    options.add_out(parser, "")


def main(chosen: argparse.Namespace) -> str:
    """Let the judges judge the models that they have not judged yet by this code; return the tables."""
    out = options.out_of(chosen, chosen.quick, "")
    kept = {(one["model"], one["judge"]): one for one in rows_of(out / FILE)}

    def is_done(name: str, judge: str) -> bool:
        known = kept.get((name, judge), {})
        as_asked = known.get("settings") == settings_of(name, judge, chosen)
        return as_asked and known.get("code") == code(name, judge) and judge not in chosen.redo

    asked = [(name, judge) for judge in chosen.judges for name in chosen.only]
    work = sorted((at for at in asked if not is_done(*at)), key=order)

    def run(name: str, judge: str) -> None:
        if is_asked(name, judge, rows_of(out / FILE)):
            result = judged(name, judge, settings_of(name, judge, chosen), chosen.data)
            put(out / FILE, result, key=itemgetter("model", "judge"))

    budget = Budget(seconds=60 * chosen.minutes)
    budget.go([(f"{name}, {judge}", functools.partial(run, name, judge)) for name, judge in work], "result")
    left_out = [f"{len(budget.left_out)} results did not fit into the time."] if budget.left_out else []
    return "\n".join([*broken_tables.markdown(rows_of(out / FILE)), *left_out])
