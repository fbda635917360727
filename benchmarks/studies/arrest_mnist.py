"""ARREST on MNIST, L-inf eps 0.3: adversarial training from scratch, finetuning, and finetuning by ARREST."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from purify_fast.attacks import PGD, AutoAttack
from purify_fast.data import DataSet
from purify_fast.evaluation import AttackSpec, Tradeoff, merge, plot_tradeoff
from purify_fast.evaluation.show.tables import markdown_table
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.training import FitConfig, fit, load_classifier, save_classifier
from purify_fast.training.config import TrainingAttack

from . import Job, mnist
from .job_folders import counts, joined

STANDARD, SCRATCH, FINETUNED, ARREST = "standard", "AT from scratch", "AFT", "ARREST"
MODELS = (STANDARD, SCRATCH, FINETUNED, ARREST)
AUTOATTACK = "then AutoAttack standard, first {}"


@dataclass(frozen=True)
class Budget:
    """Everything that can be chosen."""

    train_images: int = 60000
    images: int = 1000
    width: int = 11
    standard_epochs: int = 5
    scratch_epochs: int = 8
    epochs: int = 6
    attack_in_training: int = 7  # steps of PGD, from scratch and finetuning alike
    step_in_training: float = 2.0  # its alpha, in eps / steps
    weight: float = 5.0
    angle: float = 30.0
    warm_up: float = 0.5
    learning_rate: float = 1e-2
    weight_decay: float = 1e-3
    steps: int = 50
    autoattack: int = 300
    autoattack_steps: int = 100
    queries: int = 5000

    @property
    def alpha(self) -> float:
        return self.step_in_training * mnist.EPS / self.attack_in_training


DEFAULT = Budget()
FULL = Budget(
    images=10000, standard_epochs=20, scratch_epochs=20, epochs=20, attack_in_training=40, steps=200, autoattack=1000
)
QUICK = Budget(
    train_images=640,
    images=20,
    width=4,
    standard_epochs=1,
    scratch_epochs=1,
    epochs=1,
    attack_in_training=1,
    steps=2,
    autoattack=4,
    autoattack_steps=2,
    queries=2,
)


def _images(job: Job) -> DataSet:
    b: Budget = job.settings["budget"]
    return mnist.load(job.settings["data"], b.train_images, b.images)


def train_classifier(job: Job, folder: Path, root: Path) -> dict:
    b: Budget = job.settings["budget"]
    epochs, eps = (b.standard_epochs, 0.0) if job.name == STANDARD else (b.scratch_epochs, mnist.EPS)
    model = mnist.train_classifier(
        job, folder, _images(job), b.width, epochs, eps=eps, steps=b.attack_in_training, alpha=b.alpha
    )
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 1, 28, 28))
    return {"mflop": counter.get_total_flops() / 1e6}


def config(budget: Budget, name: str) -> ArrestConfig:
    """A row's finetuning."""
    b = budget
    attack = TrainingAttack(eps=mnist.EPS, steps=b.attack_in_training, alpha=b.alpha, eps_warmup=b.warm_up)
    return ArrestConfig(
        attack=attack, optimizer="adamw", schedule="one_cycle", learning_rate=b.learning_rate,
        weight_decay=b.weight_decay, angle=b.angle, distillation_weight=b.weight if name == ARREST else 0.0,
        replay=name == ARREST,
    )  # fmt: skip


def finetune(job: Job, folder: Path, root: Path) -> dict:
    b: Budget = job.settings["budget"]
    images = _images(job)
    task = ArrestTask(load_classifier(job.folder(root, STANDARD)), config(b, job.name), images.image_shape)
    if task.teacher is not None:
        task.teacher.keep(images.x_train, progress=False)
    last = fit(task, images.x_train, images.y_train, FitConfig(b.epochs, 128, job.seed), folder)
    save_classifier(task.result, folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    shares = [row["replayed"] for row in log if "replayed" in row][: (b.epochs + 1) // 2]
    return last | {"replayed": sum(shares) / max(1, len(shares))}


def attack(job: Job, folder: Path, root: Path) -> dict:
    b: Budget = job.settings["budget"]
    attacks = [
        AttackSpec(PGD()),
        AttackSpec(PGD(loss="dlr"), survivors_only=True, label=f"then PGD-{b.steps} dlr"),
        AttackSpec(
            AutoAttack(steps=b.autoattack_steps, n_queries=b.queries),
            survivors_only=True,
            max_images=b.autoattack,
            label=AUTOATTACK.format(b.autoattack),
        ),
    ]
    model = load_classifier(job.folder(root, job.settings["model"]))
    return mnist.attack(job, folder, model, _images(job), attacks=attacks, steps=b.steps, eot_iter=1)


def jobs(path: str, seed: int = 0, budget: Budget = DEFAULT) -> list[Job]:
    """The trainings, then the attacks."""
    common = {"data": path, "budget": budget}
    made = [Job(name, seed, train_classifier, (), common) for name in (STANDARD, SCRATCH)]
    made += [Job(name, seed, finetune, (STANDARD,), common) for name in MODELS[2:]]
    return made + [Job(f"{name} attacked", seed, attack, (name,), {**common, "model": name}) for name in MODELS]


def write(root: Path, folder: Path, seed: int = 0, budget: Budget = DEFAULT) -> Path:
    """``arrest_mnist.md`` and its JSON and pictures in ``folder``."""
    b, job = budget, Job("report", seed, attack)
    found = {name: joined([job.folder(root, f"{name} attacked")]) for name in MODELS}
    facts = {name: job.result(root, name) for name in MODELS}
    whole, auto = merge(found.values()), AUTOATTACK.format(b.autoattack)
    points, sums = {}, []
    for name, report in found.items():
        clean, worst, under_auto = (report.row(row) for row in ("clean", "worst", auto))
        accuracies = [100 * row.accuracy for row in (clean, worst)]
        points[name] = (*accuracies, *(100 * row.standard_error for row in (clean, worst)))
        first = Tradeoff(100 * float(clean.robust[: b.autoattack].mean()), 100 * under_auto.accuracy)
        both = Tradeoff(*accuracies)
        sums.append([name, f"{both.sum:.1f}", f"{both.nrr:.2f}", f"{first.sum:.1f}", f"{first.nrr:.2f}"])
    head = ["", "SUM of clean and worst", "NRR", "SUM of clean and AutoAttack, on its images", "NRR"]
    c = config(b, ARREST)
    minutes = (f"{name} {fact['minutes']:.1f}" for name, fact in facts.items())
    lines = [
        f"MNIST, the first {b.images} test images, L-inf eps {mnist.EPS}, seed {seed}; accuracy ± standard error, %. "
        f"Classifiers of {facts[STANDARD]['mflop']:.2f} MFLOP an image: {b.standard_epochs} epochs on clean images; "
        f"{b.scratch_epochs} of PGD-{b.attack_in_training} from scratch; {b.epochs} of PGD-{b.attack_in_training} from "
        f"the first, finetuned. AFT: nothing more; ARREST: distillation with lambda {c.distillation_weight:g}, on "
        f"the penultimate layer, and replay above {c.angle:g} degrees in the first half "
        f"({facts[ARREST]['replayed']:.1%} of the images of that half). In all of them PGD's step is "
        f"{b.step_in_training:g} eps / {b.attack_in_training}, and eps rises linearly over the first "
        f"{c.attack.eps_warmup:.0%} of the epochs. Each attack that begins with "
        "`then` attacks what those before it left.",
        "",
        *whole.comparison(),
        "",
        *markdown_table(head, sums),
        "",
        *(f"- {name} minus {SCRATCH}: clean {found[name].paired(found[SCRATCH], 'clean')}; {auto[5:]} "
          f"{found[name].paired(found[SCRATCH], auto)}." for name in MODELS[2:]),
        f"- Minutes of training, one thread: {', '.join(minutes)}.",
        "",
        *counts(whole),
    ]  # fmt: skip
    page = mnist.write(whole, folder, "arrest_mnist", lines, {n: load_classifier(job.folder(root, n)) for n in MODELS})
    plot_tradeoff(folder / "arrest_mnist" / "tradeoff.png", points, title="MNIST, eps 0.3: clean and worst of PGD")
    return page
