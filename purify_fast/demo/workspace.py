"""Where the demonstration keeps its files, how much it does, how it trains and attacks, and its second process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._process import end_with_parent, end_workers, worker_pool
from ..attacks import AutoAttack
from ..evaluation import AttackSpec, Report
from ..models.classifiers import SmallCNN
from ..speed import retain_freed_memory
from ..training import ClassifierConfig, ClassifierTask, FitConfig, Task, fit, load_classifier, save_classifier
from .setting import BASE_EPOCHS, BASE_TRAINING, attacked, digits

STANDARD, BASE = "standard", "base (PGD-AT)"
AUTOATTACK = "AutoAttack standard (CARSO: z = 0)"
CLASSIFIERS = {STANDARD: "standard", BASE: "base"}


@dataclass(frozen=True)
class Budget:
    """How much of everything, as chosen on digits.

    Args:
        images: held-out images that are attacked.
        standard_epochs: of the standard classifier.
        base_epochs: of the adversarially trained base.
        objective_epochs: of CARSO with the paper's objective.
        pipeline_epochs: of CARSO's fine-tuning through the pipeline.
        steps: of PGD on CARSO, ARREST and their bases.
        eot: draws of a random defence averaged per step.
        peel_steps: of PGD through the PeeL output.
        peel_images: images for the attack through the PeeL output, the first so many.
        autoattack_images: images for AutoAttack, the first so many.
        autoattack_steps: of AutoAttack's APGD and FAB.
        autoattack_queries: of AutoAttack's Square.
        generator_epochs: of AToP's pre-training.
        atop_objective_epochs: of AToP with the paper's objective.
        atop_cls_delay: of these, without the cross-entropy.
        atop_pipeline_epochs: of AToP's fine-tuning through the pipeline.
        atop_steps: of PGD on AToP.
        atop_images: images for the attacks on AToP, the first so many.
        arrest_epochs: of ARREST, and of adversarial finetuning alone.
        arrest_carso_epochs: of CARSO's training on ARREST's result.
    """

    images: int = 500
    standard_epochs: int = 20
    base_epochs: int = BASE_EPOCHS
    # CARSO
    objective_epochs: int = 30
    pipeline_epochs: int = 50
    steps: int = 50
    eot: int = 3
    peel_steps: int = 40
    peel_images: int = 100
    autoattack_images: int = 200
    autoattack_steps: int = 100
    autoattack_queries: int = 1000
    # AToP
    generator_epochs: int = 30
    atop_objective_epochs: int = 30
    atop_cls_delay: int = 2
    atop_pipeline_epochs: int = 20
    atop_steps: int = 40
    atop_images: int = 200
    # ARREST
    arrest_epochs: int = 40
    arrest_carso_epochs: int = 15


QUICK = Budget(
    images=60,
    standard_epochs=3,
    base_epochs=6,
    objective_epochs=3,
    pipeline_epochs=3,
    steps=8,
    eot=2,
    peel_steps=8,
    peel_images=30,
    autoattack_images=8,
    autoattack_steps=4,
    autoattack_queries=20,
    generator_epochs=2,
    atop_objective_epochs=2,
    atop_cls_delay=1,
    atop_pipeline_epochs=1,
    atop_steps=4,
    atop_images=20,
    arrest_epochs=2,
    arrest_carso_epochs=1,
)


@dataclass(frozen=True)
class Workspace:
    """Where a demonstration keeps its files, how much it does, and whether it shows its progress.

    Args:
        out: the folder for the files.
        budget: how much is trained and attacked.
        seed: of everything random.
        progress: whether bars are shown.
    """

    out: Path
    budget: Budget
    seed: int
    progress: bool = True

    def train(self, task: Task, epochs: int, batch_size: int, folder: str) -> None:
        """Train, or go on with it, in the folder of that name."""
        threads = torch.get_num_threads()
        # batches of small images: a second thread costs more than it brings
        torch.set_num_threads(1)
        try:
            config = FitConfig(epochs, batch_size, self.seed)
            images = digits()
            fit(task, images.x_train, images.y_train, config, self.out / folder, title=folder, progress=self.progress)
        finally:
            torch.set_num_threads(threads)

    def attacked(self, model: nn.Module, name: str, folder: str, attacks: list[AttackSpec], **options: Any) -> Report:
        """Attack a model on the held-out images; finished rows are kept in the folder and reused."""
        budget = self.budget
        return attacked(
            model, budget.images, attacks, seed=self.seed, out=self.out / folder, name=name, progress=self.progress,
            **{"steps": budget.steps, "eot_iter": budget.eot} | options,
        )  # fmt: skip

    def classifier(self, name: str) -> nn.Module:
        """The trained `STANDARD` or `BASE`."""
        return load_classifier(self.out / CLASSIFIERS[name])

    def train_classifier(self, name: str) -> None:
        """`STANDARD`, or `BASE`: adversarially trained, until more training stopped helping."""
        torch.manual_seed(self.seed)
        model = SmallCNN()
        config, epochs = ClassifierConfig(), self.budget.standard_epochs
        if name == BASE:
            config, epochs = BASE_TRAINING, self.budget.base_epochs
        folder = CLASSIFIERS[name]
        self.train(ClassifierTask(model, config), epochs, 64, folder)
        save_classifier(model, self.out / folder)


def autoattack(budget: Budget) -> AttackSpec:
    """AutoAttack's row, the same for every model.

    A random model is attacked in its deterministic mode (CARSO: z = 0), the only one that its standard version is for.
    """
    attack = AutoAttack(steps=budget.autoattack_steps, n_queries=budget.autoattack_queries)
    return AttackSpec(attack, variant="deterministic", max_images=budget.autoattack_images, label=AUTOATTACK)


def _prepare() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    retain_freed_memory()


class SecondProcess:
    """A second process, for the core that small batches leave idle.

    It does what it is given, in that order; what it has not begun can be taken back.

    Args:
        workspace: what the work is done in.
    """

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self.pool = worker_pool(1, _prepare)
        self.given: list[tuple[Future[Any], Callable[..., Any], tuple[str, ...], Future[Any] | None]] = []

    def __enter__(self) -> SecondProcess:
        return self

    def __call__(self, work: Callable[..., Any], *arguments: str, after: Future[Any] | None = None) -> Future[Any]:
        """Give it something to do.

        Args:
            work: a function of the workspace and of the arguments.
            arguments: further arguments of it.
            after: what must be done before.
        """
        future = self.pool.submit(work, replace(self.workspace, progress=False), *arguments)
        self.given.append((future, work, arguments, after))
        return future

    def finish(self) -> None:
        """Do what was not begun, last first, and wait for the rest."""
        for future, work, arguments, after in reversed(self.given):
            if future.cancel():
                if after is not None:
                    after.result()
                work(self.workspace, *arguments)
        for future, *_ in self.given:
            if not future.cancelled():
                future.result()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            # what it works on can take minutes, and goes on where it was
            end_workers()
        self.pool.shutdown(cancel_futures=True)
