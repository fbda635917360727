"""The demonstration: from digits to a defended and honestly attacked classifier, in minutes on a CPU.

Four models under the same attacks: a standard classifier, an adversarially trained one (the base, trained until more
training stopped helping), CARSO on that base as published, and CARSO fine-tuned through the whole pipeline (ours).
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import data
from .carso import Carso, CarsoConfig, CarsoTask, Head
from .evaluation import Attack, Report, evaluate, merge
from .nn import SmallCNN
from .training import ClassifierConfig, ClassifierTask, FitConfig, fit, save_classifier
from .training.checkpoint import atomic

EPS = 0.2
LAYERS = ("conv1", "conv2", "conv3", "conv4", "hidden")
STANDARD, BASE, PUBLISHED, PIPELINE = "standard", "base (PGD-AT)", "CARSO published", "CARSO pipeline"


@dataclass(frozen=True)
class Budget:
    """How much of everything; ours, set on digits."""

    standard_epochs: int = 20
    base_epochs: int = 150
    published_epochs: int = 40
    pipeline_epochs: int = 100
    images: int = 500
    steps: int = 100
    peel_steps: int = 40
    eot: int = 5
    autoattack_images: int = 100
    autoattack_queries: int = 1000


QUICK = Budget(3, 6, 4, 3, 100, 10, 10, 2, 16, 50)


def _heading(text: str, began: float) -> None:
    print(f"\n[{time.monotonic() - began:4.0f} s] {text}", flush=True)


def _train(model: nn.Module, task, digits: data.DataSet, epochs: int, seed: int, folder: Path) -> nn.Module:
    config = FitConfig(epochs, batch_size=64, seed=seed)
    fit(task, digits.x_train, digits.y_train, config, folder, title=folder.name)
    return model.eval()


def run(out: Path = Path("runs/demo"), quick: bool = False, seed: int = 0) -> Report:
    """Train, attack, report. Writes ``out/report.md``, ``report.json`` and PNG pictures; finished parts are reused.

    Args:
        out: the folder; ``quick`` runs use ``out`` with ``-quick`` appended, since their numbers mean nothing.
        quick: the same path with tiny budgets.
        seed: of everything.
    """
    began = time.monotonic()
    budget = QUICK if quick else Budget()
    out = out.with_name(out.name + "-quick") if quick else out
    digits = data.load("digits")
    x, y = digits.x_test[: budget.images], digits.y_test[: budget.images]
    chance = f"{len(digits.x_train)} training images, {len(x)} held-out ones attacked, L-inf eps {EPS}"
    _heading(f"digits, {digits.image_shape}: {chance}", began)

    _heading("1/4 a standard classifier, and an adversarially trained one (the base)", began)
    torch.manual_seed(seed)
    standard, base = SmallCNN(), SmallCNN()
    _train(
        standard, ClassifierTask(standard, ClassifierConfig()), digits, budget.standard_epochs, seed, out / "standard"
    )
    adversarial = ClassifierConfig(eps=EPS, steps=7)
    _train(base, ClassifierTask(base, adversarial), digits, budget.base_epochs, seed, out / "base")

    _heading("2/4 CARSO's purifier on the base, as published: attacks see the classifier alone", began)
    size = {"cond_dim": 64, "latent_dim": 8, "samples": 8, "decoder_width": 8}
    published = Carso(base, LAYERS, digits.image_shape, **size)
    config = CarsoConfig(eps=EPS, steps=20)
    _train(published, CarsoTask(published, config), digits, budget.published_epochs, seed, out / "published")

    _heading("3/4 CARSO fine-tuned through the whole pipeline (ours)", began)
    pipeline = Carso(base, LAYERS, digits.image_shape, **size)
    pipeline.load_state_dict(published.state_dict())
    config = CarsoConfig(attack_target="pipeline", eps=EPS, steps=7)
    _train(pipeline, CarsoTask(pipeline, config), digits, budget.pipeline_epochs, seed, out / "pipeline")
    for defence, name in ((published, "published"), (pipeline, "pipeline")):
        defence.save(out / name)
        save_classifier(base, out / name / "classifier")

    _heading("4/4 attacks, each with full knowledge of the model it attacks", began)
    reports = _attack(standard, base, published, pipeline, x, y, budget, out, seed)
    report = merge(reports.values())
    text = _conclusion(reports, budget, quick)
    print()
    print(report.to_text(color=sys.stdout.isatty()))
    print()
    print("\n".join(text))
    report.save(out, pipeline)
    for name in ("report.md",):
        with atomic(out / name) as temporary:
            temporary.write_text("\n".join([*text, "", _pictures(out), (out / name).read_text()]))
    _heading(f"written: {out}/report.md, report.json and {len(list(out.glob('*.png')))} pictures", began)
    return report


def _attack(standard, base, published, pipeline, x: Tensor, y: Tensor, budget: Budget, out: Path, seed: int) -> dict:
    common = {"eps": EPS, "steps": budget.steps, "eot": budget.eot, "seed": seed, "batch_size": 250}
    plain = [Attack(loss="ce"), Attack(loss="dlr")]
    auto = Attack("autoattack", variant="deterministic", limit=budget.autoattack_images)
    auto = replace(auto, queries=budget.autoattack_queries)
    reports = {
        STANDARD: evaluate(standard, x, y, attacks=plain, name=STANDARD, out=out / "standard", **common),
        BASE: evaluate(base, x, y, attacks=[*plain, auto], name=BASE, out=out / "base", **common),
    }
    for defence, name, folder in ((published, PUBLISHED, "published"), (pipeline, PIPELINE, "pipeline")):
        # first what is cheap: images that fall to the attack on z = 0 need no attack with K samples
        zero = Head(defence, deterministic=True)
        adaptive = [
            Attack(loss="ce", target=zero, label=f"PGD-{budget.steps} ce on z = 0, tried at K = 8"),
            Attack(loss="ce"),
            Attack(loss="dlr"),
        ]
        deterministic = [replace(attack, variant="deterministic") for attack in plain]
        other = [
            Attack(loss="ce", target=base, label="transfer from the base"),
            Attack(loss="ce", steps=budget.peel_steps, head="peel_reference", label="through PeeL, as published"),
            auto,
        ]
        report = evaluate(defence, x, y, attacks=adaptive, cascade=True, name=name, out=out / folder, **common)
        rest = evaluate(defence, x, y, attacks=[*deterministic, *other], name=name, out=out / folder, **common)
        reports[name] = _joined(report, rest)
    return reports


def _joined(cascade: Report, rest: Report) -> Report:
    """One report of a cascade and of attacks beside it, with the worst per image over the adaptive ones."""
    raise AssertionError


def _conclusion(reports: dict[str, Report], budget: Budget, quick: bool) -> list[str]:
    return []


def _pictures(out: Path) -> str:
    return "\n".join(f"![{path.stem}]({path.name})" for path in sorted(out.glob("*.png"))) + "\n"


def clean(out: Path) -> None:
    """Remove a demonstration's folder."""
    shutil.rmtree(out, ignore_errors=True)
