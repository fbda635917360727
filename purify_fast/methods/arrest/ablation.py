"""What each part of ARREST brings: adversarial training, finetuning, distillation and replay, trained and attacked.

Finished rows are kept: the same call goes on where it was.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._files import write_text
from ...attacks import PGD, AutoAttack
from ...attacks.autoattack import implementation
from ...data import DataSet
from ...evaluation import AttackSpec, Tradeoff, ar_point_dist, evaluate, plot_tradeoff
from ...models.classifiers import representation_before_pooling
from ...training import ClassifierConfig, ClassifierTask, FitConfig, Task, fit, load_classifier, save_classifier
from .config import AblationConfig, ArrestConfig
from .task import ArrestTask
from .teacher import Teacher

STANDARD, SCRATCH, FINETUNED = "standard", "AT from scratch", "AFT"
ROBUST, AUTO = "PGD ce + dlr", "AutoAttack"


def rows(config: ArrestConfig, what: AblationConfig) -> dict[str, ArrestConfig]:
    """Each row's name and its training: finetuning without either part, with each, and with both.

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
        raise ValueError("replay is off, and on in the rows of angles and taus: give none of them (--angles, --taus)")
    bare = replace(config, distillation_weight=0.0, replay=False, angle=ArrestConfig.angle, tau=None)
    distilled: dict[str, dict[str, Any]] = {f"lambda {w:g}": {"distillation_weight": w} for w in what.weights}
    replayed: dict[str, dict[str, Any]] = {f"phi {a:g}": {"replay": True, "angle": a} for a in what.angles}
    replayed |= {f"tau {t:g}": {"replay": True, "tau": t} for t in what.taus}
    made = {FINETUNED: bare}
    made |= {f"AFT + RGKD, {name}": replace(bare, **options) for name, options in distilled.items()}
    made |= {f"AFT + NR, {name}": replace(bare, **options) for name, options in replayed.items()}
    return made | {
        f"ARREST, {one}, {two}": replace(bare, **distilled[one], **replayed[two])
        for one in distilled
        for two in replayed
    }


@dataclass(frozen=True)
class _Result:
    """One row: accuracies in percent, clean and robust, with their standard errors; of all images under PGD, and of
    AutoAttack's if it ran."""

    pgd: Tradeoff
    pgd_errors: tuple[float, float]
    auto: Tradeoff | None = None
    auto_errors: tuple[float, float] = (0.0, 0.0)

    @property
    def point(self) -> Tradeoff:
        """What SUM and the other trade-offs are of."""
        return self.pgd if self.auto is None else self.auto

    @property
    def errors(self) -> tuple[float, float]:
        return self.pgd_errors if self.auto is None else self.auto_errors


def ablate(
    make: Callable[[], nn.Module],
    images: DataSet,
    config: ArrestConfig,
    what: AblationConfig,
    loop: FitConfig,
    out: str | Path,
    progress: bool = True,
) -> list[Path]:
    """Train and attack every row, and write ``ablation.md``, ``ablation.csv`` and, with matplotlib, ``ablation.png``.

    Args:
        make: a fresh classifier, one of `purify_fast.models.CLASSIFIERS`, on the images' device; torch is seeded
            before.
        images: to train on and to attack.
        config: of the finetunings, but for lambda and the replay's threshold, which `AblationConfig` lists. Its attack
            is that of the classifiers trained from scratch too, and its eps that of the attacks in the end.
        what: see `AblationConfig`. loop: of every training; its epochs are the finetunings'.
        out: folder; holds each row's run as well.
        progress: whether to show bars.

    Returns:
        What was written, the table first.

    Raises:
        ValueError: settings that cannot be trained or would be ignored; a folder that holds others.
        ModuleNotFoundError: AutoAttack or scipy is missing.
    """
    out = Path(out)
    ar_point_dist(((0, 1), (1, 0)), (0, 1))  # needs scipy, at the end: said now if it is missing
    if what.autoattack:
        implementation()
    attack = config.attack
    finetunings = rows(config, what)  # what it refuses is refused before any work
    if config.pooled:
        start = make()
        Teacher(start, [representation_before_pooling(start)], images.image_shape, pooled=True)
    n = min(what.images, len(images.y_test))
    what = replace(what, images=n, autoattack=min(what.autoattack, n))  # as the table says

    def trained(name: str, task: Task, epochs: int, result: nn.Module) -> nn.Module:
        fit(task, images.x_train, images.y_train, replace(loop, epochs=epochs), _folder(out, name), name, progress)
        save_classifier(result, _folder(out, name))
        return result

    def attacked(name: str, model: nn.Module) -> _Result:
        return _attack(name, model, images, config, what, loop.seed, _folder(out, name), progress)

    found: dict[str, _Result] = {}
    scratch = {STANDARD: 0.0, **{f"{SCRATCH}, eps x {s:g}": s for s in sorted(what.shares)}, SCRATCH: 1.0}
    trainings = {
        name: ClassifierConfig(
            # the step is given, since the two tasks' own defaults differ
            attack=replace(attack, eps=share * attack.eps, alpha=share * attack.step_size(attack.eps)),
            learning_rate=what.scratch_learning_rate if share else what.standard_learning_rate,
        )
        for name, share in scratch.items()
    }
    for name, share in scratch.items():
        torch.manual_seed(loop.seed)
        model = make()
        epochs = what.scratch_epochs if share else what.standard_epochs
        found[name] = attacked(name, trained(name, ClassifierTask(model, trainings[name]), epochs, model))
    for name, chosen in finetunings.items():
        model = load_classifier(_folder(out, STANDARD)).to(images.y_train.device)
        task = ArrestTask(model, chosen, images.image_shape)
        found[name] = attacked(name, trained(name, task, loop.epochs, task.result))
    return _write(out, found, list(scratch), config, what)


def _attack(
    name: str,
    model: nn.Module,
    images: DataSet,
    config: ArrestConfig,
    what: AblationConfig,
    seed: int,
    folder: Path,
    progress: bool,
) -> _Result:
    attacks = [AttackSpec(PGD()), AttackSpec(PGD(loss="dlr"), survivors_only=True, label=ROBUST)]
    if what.autoattack:
        attacks.append(AttackSpec(AutoAttack(), survivors_only=True, max_images=what.autoattack, label=AUTO))
    report = evaluate(
        model, images.x_test[: what.images], images.y_test[: what.images],
        eps=config.attack.eps, norm=config.attack.norm,
        attacks=attacks, steps=what.attack_steps, seed=seed, out=folder, name=name, progress=progress,
    )  # fmt: skip
    report.save(folder)
    clean, robust = report.row("clean"), report.row(ROBUST)
    found = _Result(
        Tradeoff(100 * clean.accuracy, 100 * robust.accuracy), (100 * clean.standard_error, 100 * robust.standard_error)
    )
    if not what.autoattack:
        return found
    auto = report.row(AUTO)
    first = replace(clean, robust=clean.robust[: auto.n])  # the images that AutoAttack had
    return replace(
        found,
        auto=Tradeoff(100 * first.accuracy, 100 * auto.accuracy),
        auto_errors=(100 * first.standard_error, 100 * auto.standard_error),
    )


def _folder(out: Path, name: str) -> Path:
    return out / name.replace(", ", "_").replace(" + ", "_").replace(" ", "_")


def _curve(points: Sequence[Tradeoff]) -> list[Tradeoff]:
    """Those of the points that no other beats in both, by rising standard accuracy."""
    kept = [p for p in points if not any(q != p and q.standard >= p.standard and q.robust >= p.robust for q in points)]
    return sorted(dict.fromkeys(kept), key=lambda point: point.standard)


def _write(
    out: Path, found: dict[str, _Result], reference: Sequence[str], config: ArrestConfig, what: AblationConfig
) -> list[Path]:
    attack = config.attack
    curve = _curve([found[name].point for name in reference])
    auto = what.autoattack > 0
    head = ["model", "standard", "robust"] + (["standard, AutoAttack's images", "AutoAttack"] if auto else [])
    head += ["SUM", "mean", "NRR", "ar_point_dist"]
    table: list[list[str]] = []
    for name, result in found.items():
        point = result.point
        far = f"{ar_point_dist(curve, point):+.2f}" if len(curve) > 1 and name not in reference else "-"
        pairs = list(zip(result.pgd, result.pgd_errors, strict=True))
        pairs += [] if result.auto is None else list(zip(result.auto, result.auto_errors, strict=True))
        sums = [f"{value:.2f}" for value in (point.sum, point.mean, point.nrr)]
        table.append([name, *(f"{value:.1f} ± {error:.1f}" for value, error in pairs), *sums, far])
    robust = f"AutoAttack, first {what.autoattack} images" if auto else f"PGD-{what.attack_steps}"
    text = [
        f"Accuracy ± standard error, %; the first {what.images} test images, {attack.norm} eps {attack.eps:.4g}; "
        f"robust: PGD-{what.attack_steps} with cross-entropy, then with DLR on what that left. "
        + (f"AutoAttack: standard, then, on the first {what.autoattack}. " if auto else "")
        + f"SUM, mean, NRR and ar_point_dist: of standard accuracy and {robust}. "
        "ar_point_dist (ours; inspired by, and not, the paper's ARDist): signed distance in points to the curve "
        f"through {', '.join(f'({p.standard:.1f}, {p.robust:.1f})' for p in curve)}, those of {'; '.join(reference)} "
        "that no other of them beats.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + len(head) * "---|",
        *("| " + " | ".join(line) + " |" for line in table),
    ]
    written = [out / "ablation.md", out / "ablation.csv"]
    write_text(written[0], "\n".join(text) + "\n")
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head, *table])
    write_text(written[1], file.getvalue())
    points = {name: (*result.point, *result.errors) for name, result in found.items()}
    drawn = plot_tradeoff(
        out / "ablation.png", points, curve if len(curve) > 1 else None, reference_name="trained from scratch",
        title=f"robust: {robust}",
    )  # fmt: skip
    return [*written, out / "ablation.png"] if drawn else written
