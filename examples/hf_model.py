"""Evaluate a model that returns an object with .logits, like the models of Hugging Face, and defend it by CARSO.

python examples/hf_model.py                                        # uses a small model with the same interface
python examples/hf_model.py --folder DIR                           # uses a model that transformers has saved
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import tyro

import purify_fast
from purify_fast.attacks import PGD
from purify_fast.evaluation import evaluate


class ImageClassifier(torch.nn.Module):
    """A small model with the interface of transformers' image classifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.head = torch.nn.Linear(8, 10)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        features = self.stage(pixel_values).relu()
        return SimpleNamespace(logits=self.head(features.mean((2, 3))))


class Logits(torch.nn.Module):
    """Normalizes images in [0, 1], calls the model, and returns the logits.

    Args:
        model: a model that returns an object with ``.logits``.
        mean: mean of the model's normalization.
        std: standard deviation of the model's normalization.
    """

    def __init__(self, model: torch.nn.Module, mean: float = 0.5, std: float = 0.5):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((x - self.mean) / self.std).logits


def main(folder: str | None = None, size: int = 32, layer: str = "model.stage", images: int = 8) -> None:
    """Evaluate a model, and put a purifier in front of it.

    Args:
        folder: folder of a model that transformers has saved; None: the small model of this script.
        size: height and width of the images.
        layer: name of the layer whose output is CARSO's representation.
        images: number of random images.
    """
    torch.manual_seed(0)
    if folder is None:
        model: torch.nn.Module = ImageClassifier()
    else:
        # transformers is needed only with --folder, so it is imported here.
        from transformers import AutoModelForImageClassification

        model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
    classifier = Logits(model).eval()
    x = torch.rand(images, 3, size, size)
    y = classifier(x).argmax(1)
    print(evaluate(classifier, x, y, eps=4 / 255, attacks=[PGD(steps=5)], name="model", progress=False).to_text())
    defence = purify_fast.Carso(classifier, [layer], (3, size, size), cond_dim=32, latent_dim=8, samples=2).eval()
    print(evaluate(defence, x, y, eps=4 / 255, attacks=[PGD(steps=5)], name="CARSO", progress=False).to_text())
    print("The images are random and the purifier is untrained, so these numbers mean nothing.")
    print("train_carso_cifar10.py shows how a purifier is trained.")


if __name__ == "__main__":
    tyro.cli(main)
