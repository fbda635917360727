"""Run ``python -m benchmarks broken``: several judges evaluate broken defences and robust models.

A judge is AutoAttack, a protocol of this package, an adaptive attack, or the indicators of Pintor et al. A result is
saved as soon as it is computed, with hashes of its code, and computed again if they have changed.
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
from . import adaptive, broken_tables, pintor
from .broken_tables import ADAPTIVE, ENTRIES, FILE, JUDGES, OFFICIAL, PINTOR, STRONG, Result, verdicts
from .code import code

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


def judged(name: str, judge: str, settings: dict[str, int], data: str) -> Result:
    """Let a judge evaluate a model, and return the result.

    Args:
        name: name of the model in `ENTRIES`.
        judge: name of the judge in `JUDGES`.
        settings: the largest number of images, under the key "images", and the largest number of steps, under "steps".
        data: folder of the images.
    """
    entry, (models, x, y) = ENTRIES[name], built(name, data)
    n, begin = settings["images"], time.process_time()
    result: Result = {"model": name, "judge": judge, "settings": settings}
    if judge == PINTOR:
        n = min(n, pintor.IMAGES)
        found = pintor.indicators(models[0], x[:n], y[:n], entry.eps)
        result |= {"indicators": found, "unreliable": pintor.fired(found)}
    else:
        result |= _attacked(name, judge, settings, data)
    return result | {"code": code(name, judge), "cpu_seconds": round(time.process_time() - begin, 1)}


def _attacked(name: str, judge: str, settings: dict[str, int], data: str) -> Result:
    """Evaluate a model. Return its clean accuracy, the robust images, and the signs of a failed attack."""
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
    """Shorten an attack for a trial. If ``steps`` is the usual number, return the attack unchanged."""
    attack: Any = spec.resolved
    if steps >= broken_tables.STEPS:
        return spec
    return dataclasses.replace(spec, attack=dataclasses.replace(attack, steps=min(steps, attack.steps), restarts=1))


def settings_of(name: str, judge: str, chosen: argparse.Namespace) -> dict[str, int]:
    """Return the largest numbers of images and steps with which a judge evaluates a model.

    Args:
        name: name of the model.
        judge: name of the judge.
        chosen: options of the command.
    """
    most = min(ENTRIES[name].images, STRONG_IMAGES) if judge == STRONG else ENTRIES[name].images
    return {"images": min(4, most), "steps": 2} if chosen.quick else {"images": most, "steps": broken_tables.STEPS}


def order(work: tuple[str, str]) -> tuple[bool, int, int]:
    """Return the sort key of a result. Deterministic models of digits come first, and the judge `STRONG` comes last.

    Args:
        work: names of the model and of the judge.
    """
    name, judge = work
    entry = ENTRIES[name]
    return judge == STRONG, entry.random + 2 * (entry.data != "digits"), JUDGES.index(judge)


def is_asked(name: str, judge: str, results: list[Result]) -> bool:
    """Tell whether a judge evaluates a model.

    The judge `STRONG` evaluates a model only if the verdict of ``standard`` on this model is "found" or "flagged".

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
    """Add the options of ``python -m benchmarks broken``."""
    options.add_names(parser, ENTRIES, "--only", "models that are evaluated")
    parser.add_argument("--data", default="data", help="folder with MNIST and CIFAR-10; default: data")
    options.add_out(parser, "")


def main(chosen: argparse.Namespace) -> str:
    """Compute the results that are missing or outdated, and return the tables."""
    out = options.out_of(chosen, chosen.quick, "")
    kept = {(one["model"], one["judge"]): one for one in rows_of(out / FILE)}

    def is_done(name: str, judge: str) -> bool:
        known = kept.get((name, judge), {})
        as_asked = known.get("settings") == settings_of(name, judge, chosen)
        return as_asked and known.get("code") == code(name, judge)

    asked = [(name, judge) for judge in JUDGES for name in chosen.only]
    work = sorted((at for at in asked if not is_done(*at)), key=order)

    def run(name: str, judge: str) -> None:
        if is_asked(name, judge, rows_of(out / FILE)):
            result = judged(name, judge, settings_of(name, judge, chosen), chosen.data)
            put(out / FILE, result, key=itemgetter("model", "judge"))

    Budget().go([(f"{name}, {judge}", functools.partial(run, name, judge)) for name, judge in work], "result")
    return "\n".join(broken_tables.markdown(rows_of(out / FILE)))
