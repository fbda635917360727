"""The contributions of ARREST's parts: adversarial training, finetuning, distillation and replay, trained and attacked.

Finished rows are kept: the same call resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._files import write_text
from ...attacks import PGD, AutoAttack
from ...attacks.original_autoattack import implementation
from ...data import DataSet
from ...evaluation import AttackSpec, EvaluateConfig, Report, Tradeoff, ar_point_dist, evaluate, plot_tradeoff
from ...evaluation.show.tables import markdown_table
from ...models.classifiers import representation_before_pooling
from ...training import (
    ClassifierConfig,
    ClassifierTask,
    FitConfig,
    Task,
    TrainingAttack,
    fit,
    load_classifier,
    save_classifier,
)
from .config import AblationConfig, ArrestConfig
from .task import ArrestTask, Teacher

STANDARD, SCRATCH, FINETUNED = "standard", "AT from scratch", "AFT"
ROBUST, AUTO = "PGD ce + dlr", "AutoAttack"


def rows(config: ArrestConfig, what: AblationConfig) -> dict[str, ArrestConfig]:
    """The name and the training of each row: finetuning without either part, with each part, and with both.

    Raises:
        ValueError: a row that cannot be trained, or a setting of ``config`` that the rows would replace by others.
    """
    for name, several in (("distillation_weight", "weights"), ("angle", "angles"), ("tau", "taus")):
        value = getattr(config, name)
        if value != getattr(ArrestConfig, name) and value not in getattr(what, several):
            raise ValueError(
                f"{name} {value:g} would be in no row: the ablation varies it, give {several} (--{several} {value:g})"
            )
    if not config.replay and (what.angles or what.taus):
        raise ValueError("--angles and --taus switch replay on: leave them out or drop --no-replay")
    bare = replace(config, distillation_weight=0.0, replay=False, angle=ArrestConfig.angle, tau=None)
    distilled: dict[str, dict[str, Any]] = {f"lambda {w:g}": {"distillation_weight": w} for w in what.weights}
    replayed: dict[str, dict[str, Any]] = {f"phi {a:g}": {"replay": True, "angle": a} for a in what.angles}
    replayed |= {f"tau {t:g}": {"replay": True, "tau": t} for t in what.taus}
    trainings = {FINETUNED: bare}
    trainings |= {f"AFT + RGKD, {name}": replace(bare, **options) for name, options in distilled.items()}
    trainings |= {f"AFT + NR, {name}": replace(bare, **options) for name, options in replayed.items()}
    return trainings | {
        f"ARREST, {one}, {two}": replace(bare, **distilled[one], **replayed[two])
        for one in distilled
        for two in replayed
    }


def ablate(
    make: Callable[[], nn.Module],
    images: DataSet,
    config: ArrestConfig,
    what: AblationConfig,
    loop: FitConfig,
    *,
    out: str | Path,
    progress: bool = True,
) -> list[Path]:
    """Train and attack every row, and write ``ablation.md`` and, with matplotlib, ``ablation.png``.

    Args:
        make: makes a fresh classifier, one of `purify_fast.models.CLASSIFIERS`, on the images' device; torch is seeded
            before.
        images: to train on and to attack.
        config: settings of the finetunings, but for lambda and the replay's threshold, which `AblationConfig` lists.
            Its attack is also that of the classifiers trained from scratch, and its eps that of the attacks in the end.
        what: the rows, and how they are attacked.
        loop: settings of every training; its epochs are the finetunings'.
        out: folder; holds each row's run as well.
        progress: whether to show bars.

    Returns:
        The written files, the table first.

    Raises:
        ValueError: settings that cannot be trained or would be ignored; a folder that holds others.
        ModuleNotFoundError: AutoAttack or scipy is missing.
    """
    # before any work, check everything that would stop a later step: scipy, AutoAttack, refused settings
    ar_point_dist(((0, 1), (1, 0)), (0, 1))
    if what.autoattack:
        implementation()
    finetunings = rows(config, what)
    if config.pooled:
        start = make()
        Teacher(start, [representation_before_pooling(start)], images.image_shape, pooled=True)
    n = min(what.images, len(images.y_test))
    # the numbers that the table names
    what = replace(what, images=n, autoattack=min(what.autoattack, n))
    attack, out = config.attack, Path(out)
    scratch = {STANDARD: 0.0, **{f"{SCRATCH}, eps x {s:g}": s for s in sorted(what.shares)}, SCRATCH: 1.0}
    results: dict[str, list[Accuracies]] = {}
    # each later attack gets the images that withstood the earlier attacks
    attacks = [AttackSpec(PGD()), AttackSpec(PGD(loss="dlr"), survivors_only=True, label=ROBUST)]
    if what.autoattack:
        attacks.append(AttackSpec(AutoAttack(), survivors_only=True, max_images=what.autoattack, label=AUTO))

    def folder(name: str) -> Path:
        return out / name.replace(", ", "_").replace(" + ", "_").replace(" ", "_")

    def train_and_attack(name: str, task: Task, epochs: int) -> None:
        model, run = task.result, replace(loop, epochs=epochs)
        fit(task, images.x_train, images.y_train, run, folder(name), title=name, progress=progress)
        save_classifier(model, folder(name))
        report = evaluate(
            model,
            images.x_test[:n],
            images.y_test[:n],
            eps=attack.eps,
            norm=attack.norm,
            config=EvaluateConfig(steps=what.attack_steps, seed=loop.seed, dataset_name=images.name),
            attacks=attacks,
            out=folder(name),
            name=name,
            progress=progress,
        )
        report.save(folder(name))
        results[name] = [_accuracies(report, label) for label in ([ROBUST, AUTO] if what.autoattack else [ROBUST])]

    for name, share in scratch.items():
        classifier_config = ClassifierConfig(
            # give the step, because the defaults of the two tasks differ
            attack=replace(attack, eps=share * attack.eps, alpha=share * attack.step_size(attack.eps)),
        )
        torch.manual_seed(loop.seed)
        epochs = what.scratch_epochs if share else what.standard_epochs
        train_and_attack(name, ClassifierTask(make(), classifier_config), epochs)
    for name, chosen in finetunings.items():
        standard = load_classifier(folder(STANDARD)).to(images.y_train.device)
        train_and_attack(name, ArrestTask(standard, chosen, images.image_shape), loop.epochs)
    return write(out, results, list(scratch), attack, what)


#: Clean and robust accuracy on the same images, in percent, and their standard errors.
Accuracies = tuple[float, float, float, float]


def _accuracies(report: Report, label: str) -> Accuracies:
    """The accuracies under the attack, and on as many clean images."""
    robust, clean = report.row(label), report.row("clean")
    clean = replace(clean, robust=clean.robust[: robust.n])
    values = (clean.accuracy, robust.accuracy, clean.standard_error, robust.standard_error)
    return tuple(100 * value for value in values)  # type: ignore[return-value]


def best_points(points: Sequence[Tradeoff]) -> list[Tradeoff]:
    """The points that no other beats in both accuracies, by rising standard accuracy."""

    def beaten(point: Tradeoff) -> bool:
        return any(p != point and p.standard >= point.standard and p.robust >= point.robust for p in points)

    return sorted({point for point in points if not beaten(point)}, key=lambda point: point.standard)


def write(
    out: Path,
    results: Mapping[str, list[Accuracies]],
    reference: Sequence[str],
    attack: TrainingAttack,
    what: AblationConfig,
) -> list[Path]:
    """Write the table and, with matplotlib, the picture.

    ``results`` are the accuracies under PGD and, if it ran, under AutoAttack on its images; SUM and the other
    trade-offs use the last. The rows that ``reference`` names make the curve.
    """
    curve = best_points([Tradeoff(*results[name][-1][:2]) for name in reference])
    auto = what.autoattack > 0
    head = ["model", "standard", "robust"] + (["standard, AutoAttack's images", "AutoAttack"] if auto else [])
    head += ["SUM", "mean", "NRR", "ar_point_dist"]
    table: list[list[str]] = []
    for name, result in results.items():
        point = Tradeoff(*result[-1][:2])
        far = f"{ar_point_dist(curve, point):+.2f}" if len(curve) > 1 and name not in reference else "-"
        cells = [f"{one[i]:.1f} ± {one[i + 2]:.1f}" for one in result for i in (0, 1)]
        table.append([name, *cells, *(f"{value:.2f}" for value in (point.sum, point.mean, point.nrr)), far])
    robust = f"AutoAttack, first {what.autoattack} images" if auto else f"PGD-{what.attack_steps}"
    text = [
        f"Accuracy ± standard error, %; the first {what.images} test images, {attack.norm} eps {attack.eps:.4g}; "
        f"robust: PGD-{what.attack_steps} with cross-entropy, then with DLR on what that left. "
        + (f"AutoAttack: standard, then, on the first {what.autoattack}. " if auto else "")
        + f"SUM, mean, NRR and ar_point_dist: of standard accuracy and {robust}. "
        "ar_point_dist (this package's own; inspired by, and not, the paper's ARDist): signed distance in points to "
        f"the curve through {', '.join(f'({p.standard:.1f}, {p.robust:.1f})' for p in curve)}, those of "
        f"{'; '.join(reference)} that no other of them beats.",
        "",
        *markdown_table(head, table),
    ]
    write_text(out / "ablation.md", "\n".join(text) + "\n")
    points = {name: result[-1] for name, result in results.items()}
    shown = curve if len(curve) > 1 else None
    drawn = plot_tradeoff(
        out / "ablation.png", points, shown, reference_name="trained from scratch", title=f"robust: {robust}"
    )
    return [out / "ablation.md", *([out / "ablation.png"] if drawn else [])]
