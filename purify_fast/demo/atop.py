"""AToP's part: a standard classifier behind a purifier that was only pre-trained, fine-tuned with the paper's
objective, and fine-tuned through the whole pipeline."""

from __future__ import annotations

from dataclasses import replace

import torch

from .._tensors import weights_fingerprint
from ..attacks import PGD
from ..evaluation import AttackSpec, Report
from ..methods.atop import Atop, AtopConfig, AtopTask
from ..methods.atop.generators import SmallGenerator
from ..methods.loading import load_defence
from ..training import TrainingAttack, save_classifier
from .sentences import against, percent
from .setting import EPS, digits
from .workspace import STANDARD, Budget, Workspace

BEFORE, OBJECTIVE, PIPELINE = "purifier before AToP", "AToP, paper's objective", "AToP pipeline"
MODELS = (BEFORE, OBJECTIVE, PIPELINE)
_FOLDERS = {BEFORE: "atop_before", OBJECTIVE: "atop_objective", PIPELINE: "atop_pipeline"}
ALONE, ADAPTIVE = "PGD ce on the classifier alone (not adaptive)", "PGD ce + dlr, through everything"


def _methods(budget: Budget) -> dict[str, tuple[AtopConfig, int]]:
    """How each model is trained, and for how many epochs."""
    # the paper's objective, with a clean target; weight, rate and schedule were chosen here
    published = AtopConfig(
        attack=TrainingAttack(eps=EPS, steps=10),
        reconstruction_target="clean",
        cls_weight=0.1,
        cls_delay=budget.atop_cls_delay,
        cls_delay_unit="epochs",
        learning_rate=3e-3,
        schedule="one_cycle",
    )
    return {
        # narrower than the official discriminator, which is for images of 256 pixels
        BEFORE: (
            AtopConfig.pretraining(learning_rate=2e-3, schedule="one_cycle", discriminator_width=16),
            budget.generator_epochs,
        ),
        OBJECTIVE: (published, budget.atop_objective_epochs),
        PIPELINE: (
            replace(
                published, attack_method="pgd", attack_target="pipeline", attack=TrainingAttack(eps=EPS, steps=7),
                cls_weight=1.0, reconstruction_weight=0.1, reconstruction_target="adversarial", cls_delay=0,
            ),
            budget.atop_pipeline_epochs,
        ),
    }  # fmt: skip


def train(workspace: Workspace, name: str) -> None:
    """Train one of `MODELS`; the last two go on from the first."""
    classifier = workspace.classifier(STANDARD)
    torch.manual_seed(workspace.seed)
    origin = "scratch"
    if name == BEFORE:
        defence = Atop(classifier, SmallGenerator(1), digits().image_shape)
    else:
        defence = model(workspace, BEFORE)
        origin = weights_fingerprint(defence.purifier)
    method, epochs = _methods(workspace.budget)[name]
    workspace.train(AtopTask(defence, method, origin), epochs, 64, _FOLDERS[name])
    defence.save(workspace.out / _FOLDERS[name])
    save_classifier(classifier, workspace.out / _FOLDERS[name] / "classifier")


def model(workspace: Workspace, name: str) -> Atop:
    """One of the trained `MODELS`."""
    defence = load_defence(workspace.out / _FOLDERS[name], workspace.classifier(STANDARD))
    assert isinstance(defence, Atop)
    return defence


def attack(workspace: Workspace, name: str) -> Report:
    """One of `MODELS` under the protocol of the paper's ablations, and under one that sees the whole defence."""
    budget = workspace.budget
    n = budget.atop_images
    attacks = [
        AttackSpec(PGD(), target="classifier", label=ALONE, max_images=n),
        AttackSpec(PGD(), max_images=n),
        AttackSpec(PGD(loss="dlr"), survivors_only=True, label=ADAPTIVE, max_images=n),
    ]
    return workspace.attacked(model(workspace, name), name, _FOLDERS[name], attacks, steps=budget.atop_steps)


def conclusion(reports: dict[str, Report], budget: Budget) -> list[str]:
    """What the numbers say, in sentences made from them."""

    def all_of(name: str) -> str:
        report = reports[name]
        return (
            f"classifies {percent(report, 'clean')} of the clean images and withstands {percent(report, ALONE)} when "
            f"only its classifier is attacked, {percent(report, ADAPTIVE)} when all of it is"
        )

    def change(name: str) -> str:
        gains = [against(reports[name], reports[BEFORE], row, "before") for row in (ALONE, ADAPTIVE)]
        return f"against before: {gains[0]}, and {gains[1]}"

    return [
        f"Before AToP, the purifier {all_of(BEFORE)}.",
        f"AToP with the paper's objective {all_of(OBJECTIVE)} ({change(OBJECTIVE)}).",
        f"AToP through the pipeline {all_of(PIPELINE)} ({change(PIPELINE)}).",
        f"The attack is PGD-{budget.atop_steps}, with EOT {budget.eot} on all of it; {budget.atop_images} images.",
    ]
