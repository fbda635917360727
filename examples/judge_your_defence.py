"""Evaluate your own defence: in this example, a classifier that adds new noise to an image in each call.

A random defence is attacked with gradients that are averaged over several draws (EOT). An image counts as robust only
if several new predictions are correct. The base, which is the same classifier without the noise, is also attacked. If
the defence is not more robust than its base, the noise is useless.

    python examples/judge_your_defence.py
"""

from __future__ import annotations

import torch
import tyro

import purify_fast
from purify_fast.attacks import APGD, PGD
from purify_fast.data import to_float
from purify_fast.evaluation import AttackSpec, evaluate
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit


class Noisy(torch.nn.Module):
    """A defence that adds Gaussian noise to the images before the classifier."""

    def __init__(self, classifier: torch.nn.Module, sigma: float):
        super().__init__()
        self.classifier, self.sigma = classifier, sigma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier((x + self.sigma * torch.randn_like(x)).clamp(0, 1))


def main(epochs: int = 10, images: int = 100, eps: float = 0.1, sigma: float = 0.2, out: str | None = None) -> None:
    """Train a classifier on the package's digits, defend it by noise, and evaluate both.

    Args:
        epochs: number of epochs of the classifier's training.
        images: number of held-out images to attack.
        eps: radius of the attacks, in image units.
        sigma: standard deviation of the noise, in image units.
        out: folder for the report and its pictures; None: only print the table.
    """
    torch.manual_seed(0)
    digits = purify_fast.load_dataset("digits")
    classifier = purify_fast.models.build_classifier("small_cnn", digits.image_shape, digits.num_classes)
    clean = ClassifierConfig(attack=TrainingAttack(eps=0, steps=1))
    fit(ClassifierTask(classifier, clean), digits.x_train, digits.y_train, FitConfig(epochs=epochs), progress=False)
    classifier.eval()
    x, y = to_float(digits.x_test[:images]), digits.y_test[:images]

    defence = Noisy(classifier, sigma)
    attacks = [
        PGD(steps=10),
        APGD(steps=20),
        # This attack ignores the noise, so it says little about an attacker who knows the defence.
        AttackSpec(PGD(steps=10), through=defence.classifier),
    ]
    report = evaluate(defence, x, y, eps=eps, eot_iter=4, base=classifier, attacks=attacks, progress=False)
    base = evaluate(classifier, x, y, eps=eps, attacks=[PGD(steps=10), APGD(steps=20)], name="base", progress=False)
    print(report.to_text())
    print(base.to_text())
    kept, without = (100 * one.row("worst").accuracy for one in (report, base))
    print(f"\nThe defence keeps {kept:.0f} % of the images under its worst attack, its base {without:.0f} %.")
    if out is not None:
        report.save(out, defence)


if __name__ == "__main__":
    tyro.cli(main)
