"""What each part of ARREST brings: adversarial training, finetuning, distillation and replay, trained and attacked.

Finished rows are kept: the same call goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...attacks import PGD, AutoAttack
from ...attacks.autoattack import implementation
from ...data import DataSet
from ...evaluation import AttackSpec, Report, Tradeoff, ar_point_dist, evaluate
from ...models.classifiers import representation_before_pooling
from ...training import ClassifierConfig, ClassifierTask, FitConfig, Task, fit, load_classifier, save_classifier
from .ablation_table import Result, write
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
    """Train and attack every row, and write ``ablation.md``, ``ablation.csv`` and, with matplotlib, ``ablation.png``.

    Args:
        make: makes a fresh classifier, one of `purify_fast.models.CLASSIFIERS`, on the images' device; torch is seeded
            before.
        images: to train on and to attack.
        config: of the finetunings, but for lambda and the replay's threshold, which `AblationConfig` lists. Its attack
            is that of the classifiers trained from scratch too, and its eps that of the attacks in the end.
        what: which rows there are, and how they are attacked.
        loop: of every training; its epochs are the finetunings'.
        out: folder; holds each row's run as well.
        progress: whether to show bars.

    Returns:
        What was written, the table first.

    Raises:
        ValueError: settings that cannot be trained or would be ignored; a folder that holds others.
        ModuleNotFoundError: AutoAttack or scipy is missing.
    """
    # what would stop a later step is checked before any work: scipy, AutoAttack, refused settings
    ar_point_dist(((0, 1), (1, 0)), (0, 1))
    if what.autoattack:
        implementation()
    finetunings = rows(config, what)
    if config.pooled:
        start = make()
        Teacher(start, [representation_before_pooling(start)], images.image_shape, pooled=True)
    n = min(what.images, len(images.y_test))
    # as the table says it
    what = replace(what, images=n, autoattack=min(what.autoattack, n))
    study = _Study(images, config, what, loop, out=Path(out), progress=progress)
    scratch = {STANDARD: 0.0, **{f"{SCRATCH}, eps x {s:g}": s for s in sorted(what.shares)}, SCRATCH: 1.0}
    found: dict[str, Result] = {}
    for name, share in scratch.items():
        found[name] = study.attacked(name, study.trained_from_scratch(name, share, make))
    for name, chosen in finetunings.items():
        found[name] = study.attacked(name, study.finetuned(name, chosen))
    return write(Path(out), found, list(scratch), config.attack, what)


@dataclass(frozen=True)
class _Study:
    """Trains and attacks the models of an ablation; its fields are `ablate`'s arguments."""

    images: DataSet
    config: ArrestConfig
    what: AblationConfig
    loop: FitConfig
    out: Path
    progress: bool

    def folder(self, name: str) -> Path:
        """A row's own folder."""
        return self.out / name.replace(", ", "_").replace(" + ", "_").replace(" ", "_")

    def _trained(self, name: str, task: Task, epochs: int, result: nn.Module) -> nn.Module:
        images, folder, loop = self.images, self.folder(name), replace(self.loop, epochs=epochs)
        fit(task, images.x_train, images.y_train, loop, folder, title=name, progress=self.progress)
        save_classifier(result, folder)
        return result

    def trained_from_scratch(self, name: str, share: float, make: Callable[[], nn.Module]) -> nn.Module:
        """A fresh classifier, adversarially trained at a share of eps, or at the share 0 on clean images."""
        attack, what = self.config.attack, self.what
        config = ClassifierConfig(
            # the step is given, since the two tasks' own defaults differ
            attack=replace(attack, eps=share * attack.eps, alpha=share * attack.step_size(attack.eps)),
            learning_rate=what.scratch_learning_rate if share else what.standard_learning_rate,
        )
        torch.manual_seed(self.loop.seed)
        model = make()
        epochs = what.scratch_epochs if share else what.standard_epochs
        return self._trained(name, ClassifierTask(model, config), epochs, model)

    def finetuned(self, name: str, config: ArrestConfig) -> nn.Module:
        """The standard classifier, finetuned."""
        model = load_classifier(self.folder(STANDARD)).to(self.images.y_train.device)
        task = ArrestTask(model, config, self.images.image_shape)
        return self._trained(name, task, self.loop.epochs, task.result)

    def attacked(self, name: str, model: nn.Module) -> Result:
        """A row's accuracies, clean and under attack; the report is kept in the row's folder."""
        what, attack, folder = self.what, self.config.attack, self.folder(name)
        attacks = [AttackSpec(PGD()), AttackSpec(PGD(loss="dlr"), survivors_only=True, label=ROBUST)]
        if what.autoattack:
            attacks.append(AttackSpec(AutoAttack(), survivors_only=True, max_images=what.autoattack, label=AUTO))
        report = evaluate(
            model,
            self.images.x_test[: what.images],
            self.images.y_test[: what.images],
            eps=attack.eps,
            norm=attack.norm,
            attacks=attacks,
            steps=what.attack_steps,
            seed=self.loop.seed,
            out=folder,
            name=name,
            dataset_name=self.images.name,
            progress=self.progress,
        )
        report.save(folder)
        return _result(report, what.autoattack > 0)


def _result(report: Report, with_autoattack: bool) -> Result:
    clean, robust = report.row("clean"), report.row(ROBUST)
    pgd = Tradeoff(100 * clean.accuracy, 100 * robust.accuracy)
    found = Result(pgd, (100 * clean.standard_error, 100 * robust.standard_error))
    if not with_autoattack:
        return found
    auto = report.row(AUTO)
    # the images that AutoAttack had
    first = replace(clean, robust=clean.robust[: auto.n])
    return replace(
        found,
        auto=Tradeoff(100 * first.accuracy, 100 * auto.accuracy),
        auto_errors=(100 * first.standard_error, 100 * auto.standard_error),
    )
