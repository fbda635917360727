"""Runs an ablation of ARREST: trains classifiers without its two parts, with each and with both, and attacks them.

The parts are the distillation and the noisy replay.

Finished classifiers and attacks are stored, so an interrupted ablation can be resumed by the same call.
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
    """Return the name and the settings of each finetuning: without either part, with each part, and with both.

    Raises:
        ValueError: some settings do not fit together, or the ablation would replace a setting of ``config``.
    """
    for name, several in (("distillation_weight", "weights"), ("angle", "angles"), ("tau", "taus")):
        value = getattr(config, name)
        if value != getattr(ArrestConfig, name) and value not in getattr(what, several):
            raise ValueError(
                f"{name} {value:g} would have no effect, because the ablation varies it: add it to {several} "
                f"(--{several} {value:g})"
            )
    if not config.replay and (what.angles or what.taus):
        raise ValueError("angles and taus need replay=True, got False: leave out --angles and --taus, or --no-replay")
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
    """Train and attack all classifiers, and write ``ablation.md`` and, with matplotlib, ``ablation.png``.

    Args:
        make: function that returns a fresh classifier, one of `purify_fast.models.CLASSIFIERS`, on the device of the
            images. torch is seeded before each call.
        images: the images for training and attacks.
        config: settings of the finetunings, except lambda and the threshold of the replay, which `AblationConfig`
            lists. The classifiers from scratch are trained with its attack, and the final attacks have its eps.
        what: lists of the settings to vary, and settings of the final attacks.
        loop: settings of every training. Its epochs are those of the finetunings.
        out: folder for the table and for the run of each classifier.
        progress: whether to show progress bars.

    Returns:
        The written files; the table is the first.

    Raises:
        ValueError: settings are out of range or would have no effect, or the folder holds a run with other settings.
        ModuleNotFoundError: AutoAttack or scipy is missing.
    """
    # scipy, AutoAttack and all settings are checked before the first training, so that no error stops a later step
    ar_point_dist(((0, 1), (1, 0)), (0, 1))
    if what.autoattack:
        implementation()
    finetunings = rows(config, what)
    if config.pooled:
        start = make()
        Teacher(start, [representation_before_pooling(start)], images.image_shape, pooled=True)
    n = min(what.images, len(images.y_test))
    # if the data set has fewer images, the table must state the smaller numbers
    what = replace(what, images=n, autoattack=min(what.autoattack, n))
    attack, out = config.attack, Path(out)
    scratch = {STANDARD: 0.0, **{f"{SCRATCH}, eps x {s:g}": s for s in sorted(what.shares)}, SCRATCH: 1.0}
    results: dict[str, list[Accuracies]] = {}
    # each attack gets only the images that withstood the attacks before it
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
            # alpha is given, because its default differs between ClassifierConfig and ArrestConfig
            attack=replace(attack, eps=share * attack.eps, alpha=share * attack.step_size(attack.eps)),
        )
        torch.manual_seed(loop.seed)
        epochs = what.scratch_epochs if share else what.standard_epochs
        train_and_attack(name, ClassifierTask(make(), classifier_config), epochs)
    for name, chosen in finetunings.items():
        standard = load_classifier(folder(STANDARD)).to(images.y_train.device)
        train_and_attack(name, ArrestTask(standard, chosen, images.image_shape), loop.epochs)
    return write(out, results, list(scratch), attack, what)


#: Four numbers in percent: the clean and the robust accuracy on the same images, and then their standard errors.
Accuracies = tuple[float, float, float, float]


def _accuracies(report: Report, label: str) -> Accuracies:
    """Return the accuracies on the attacked images and on the same images without the attack."""
    robust, clean = report.row(label), report.row("clean")
    clean = replace(clean, robust=clean.robust[: robust.n])
    values = (clean.accuracy, robust.accuracy, clean.standard_error, robust.standard_error)
    return tuple(100 * value for value in values)  # type: ignore[return-value]


def best_points(points: Sequence[Tradeoff]) -> list[Tradeoff]:
    """Return the Pareto-optimal points, in ascending order of standard accuracy."""

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

    ``results`` has for each classifier the accuracies under PGD and, if AutoAttack ran, those under AutoAttack on its
    images. SUM and the other trade-offs use the last of them. The classifiers in ``reference`` define the curve.
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
        f"Accuracy ± standard error in %, on the first {what.images} test images, {attack.norm} eps {attack.eps:.4g}. "
        f"Robust: PGD-{what.attack_steps} with cross-entropy, then with DLR on the images that withstood it. "
        + (f"AutoAttack: PGD, then AutoAttack (standard), on the first {what.autoattack} images. " if auto else "")
        + f"SUM, mean, NRR and ar_point_dist are computed from standard accuracy and {robust}. ar_point_dist is this "
        "package's own measure, inspired by the paper's ARDist, but not equal to it: the signed distance in points to "
        f"the curve through {', '.join(f'({p.standard:.1f}, {p.robust:.1f})' for p in curve)}, the Pareto-optimal "
        f"points of {'; '.join(reference)}.",
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
