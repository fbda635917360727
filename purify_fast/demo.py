"""The demonstration: from digits to a defended and honestly attacked classifier, in minutes on a CPU.

Four models under the same attacks: a standard classifier, an adversarially trained one (the base, trained until more
training stopped helping), CARSO on that base as published, and CARSO fine-tuned through the whole pipeline (ours).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import data
from ._files import write_text
from .carso import Carso, CarsoConfig, CarsoTask, Head
from .evaluation import Attack, Report, evaluate, merge
from .nn import SmallCNN
from .training import ClassifierConfig, ClassifierTask, FitConfig, Task, fit, save_classifier

EPS = 0.2
LAYERS = ("conv1", "conv2", "conv3", "conv4", "hidden")
STANDARD, BASE, PUBLISHED, PIPELINE = "standard", "base (PGD-AT)", "CARSO published", "CARSO pipeline"
PEEL = "through PeeL, as published"
TRANSFER = "transfer from the base"


@dataclass(frozen=True)
class Budget:
    """How much of everything; ours, set on digits."""

    standard_epochs: int = 20
    base_epochs: int = 250
    published_epochs: int = 30
    pipeline_epochs: int = 80
    images: int = 500
    steps: int = 100
    eot: int = 5
    peel_steps: int = 40
    peel_images: int = 200
    autoattack_images: int = 50
    autoattack_queries: int = 1000


QUICK = Budget(3, 6, 3, 3, 60, 8, 2, 8, 30, 8, 50)


def run(out: Path = Path("runs/demo"), quick: bool = False, seed: int = 0) -> Report:
    """Train, attack, report. Writes ``report.md``, ``report.json`` and PNG pictures; finished parts are reused.

    Args:
        out: the folder; a quick run goes to ``out`` with ``-quick`` appended, since its numbers mean nothing.
        quick: the same path with tiny budgets.
        seed: of everything.
    """
    began = time.monotonic()

    def heading(text: str) -> None:
        print(f"\n[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    budget = QUICK if quick else Budget()
    out = out.with_name(out.name + "-quick") if quick else out
    digits = data.load("digits")
    x, y = digits.x_test[: budget.images], digits.y_test[: budget.images]
    heading(f"digits: {len(digits.x_train)} images to train on, {len(x)} held out to attack, L-inf eps {EPS}")

    threads = torch.get_num_threads()

    def train(task: Task, epochs: int, folder: str) -> None:
        torch.set_num_threads(1)  # batches of small images: a second thread costs more than it brings
        try:
            fit(task, digits.x_train, digits.y_train, FitConfig(epochs, 64, seed), out / folder, title=folder)
        finally:
            torch.set_num_threads(threads)

    heading("1/4 a standard classifier, and an adversarially trained one (the base)")
    torch.manual_seed(seed)
    standard, base = SmallCNN(), SmallCNN()
    train(ClassifierTask(standard, ClassifierConfig()), budget.standard_epochs, "standard")
    train(ClassifierTask(base, ClassifierConfig(eps=EPS, steps=7)), budget.base_epochs, "base")
    save_classifier(standard, out / "standard")
    save_classifier(base, out / "base")

    heading("2/4 CARSO's purifier on the base, as published: trained on attacks that see the classifier alone")
    published, pipeline = (
        Carso(base, LAYERS, digits.image_shape, cond_dim=64, latent_dim=8, samples=8, decoder_width=8) for _ in "12"
    )
    train(CarsoTask(published, CarsoConfig(eps=EPS, steps=20)), budget.published_epochs, "published")

    heading("3/4 the same purifier fine-tuned through the whole pipeline (ours)")
    pipeline.load_state_dict(published.state_dict())
    config = CarsoConfig(attack_target="pipeline", eps=EPS, steps=7)
    train(CarsoTask(pipeline, config), budget.pipeline_epochs, "pipeline")
    for defence, folder in ((published, "published"), (pipeline, "pipeline")):
        defence.save(out / folder)
        save_classifier(base, out / folder / "classifier")

    heading("4/4 attacks, each with full knowledge of the model it attacks")

    def attacked(model: nn.Module, attacks: list[Attack], name: str, folder: str) -> Report:
        return evaluate(
            model,
            x,
            y,
            eps=EPS,
            attacks=attacks,
            steps=budget.steps,
            eot=budget.eot,
            batch_size=125,
            seed=seed,
            out=out / folder,
            name=name,
        )

    auto = Attack(
        "autoattack", variant="deterministic", limit=budget.autoattack_images, queries=budget.autoattack_queries
    )
    plain = [Attack(loss="ce"), Attack(loss="dlr", survivors=True)]
    reports = {
        STANDARD: attacked(standard, plain, STANDARD, "standard"),
        BASE: attacked(base, [*plain, auto], BASE, "base"),
    }
    for defence, name, folder in ((published, PUBLISHED, "published"), (pipeline, PIPELINE, "pipeline")):
        attacks = [
            Attack(loss="ce", variant="deterministic"),
            Attack(loss="dlr", variant="deterministic", survivors=True),
            # cheap, and what falls to it needs no attack through K samples
            Attack(loss="ce", target=Head(defence, deterministic=True), label=f"PGD-{budget.steps} ce made at z = 0"),
            Attack(loss="ce", survivors=True),
            Attack(loss="dlr", survivors=True),
            Attack(loss="ce", target=base, label=TRANSFER),
            auto,
        ]
        if name == PUBLISHED:
            steps, limit = budget.peel_steps, budget.peel_images
            attacks.append(Attack(loss="ce", steps=steps, head="peel_reference", limit=limit, label=PEEL))
        reports[name] = attacked(defence, attacks, name, folder)

    report = merge(reports.values())
    print(f"\n{report.to_text(color=sys.stdout.isatty())}\n")
    findings = conclusion(reports, quick)
    print("\n".join(findings))
    report.save(out, {PUBLISHED: published, PIPELINE: pipeline, STANDARD: standard, BASE: base})
    pictures = [f"![{path.stem}]({path.name})" for path in sorted(out.glob("*.png"))]
    page = ["# What the numbers show", "", *findings, "", (out / "report.md").read_text(), *pictures]
    write_text(out / "report.md", "\n".join(page) + "\n")
    heading(f"written: {out}/report.md, report.json and {len(pictures)} pictures")
    return report


def conclusion(reports: dict[str, Report], quick: bool = False) -> list[str]:
    """What the numbers say, in sentences made from them."""

    def percent(model: str, attack: str) -> str:
        row = reports[model].row(attack)
        return f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f} %"

    peel, worst = reports[PUBLISHED].row(PEEL), reports[PUBLISHED].row("worst")
    against_base = reports[PIPELINE].paired(reports[BASE])
    gain, error = against_base.difference, against_base.standard_error
    verdict = "is better than" if gain > 2 * error else "is worse than" if gain < -2 * error else "is not told from"
    trust = "believable" if peel.reliable else "unreliable: the output has no usable gradients"
    lines = [
        f"The base classifies {percent(BASE, 'clean')} of the clean images and withstands {percent(BASE, 'worst')}.",
        f"CARSO as published seems to withstand {percent(PUBLISHED, PEEL)} when it is attacked through its own PeeL "
        f"output ({peel.n} images); that number is {trust}. "
        f"Through exact gradients it withstands {percent(PUBLISHED, 'worst')}"
        + (", less than its own base." if worst.accuracy < reports[BASE].row("worst").accuracy else "."),
        f"CARSO fine-tuned through the pipeline classifies {percent(PIPELINE, 'clean')} of the clean images and "
        f"withstands {percent(PIPELINE, 'worst')}: {against_base} against the base. By two standard errors it "
        f"{verdict} its base.",
    ]
    if quick:
        lines.insert(0, "QUICK RUN: hardly trained, hardly attacked; these numbers mean nothing.")
    return [f"- {line}" for line in lines]
