"""``purify-fast train classifier``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ..training import ClassifierConfig, FitConfig
from .training import FreshClassifier, finish_classifier, train


@dataclass(frozen=True)
class TrainClassifier(FreshClassifier):
    """Train a classifier: standard (eps 0) or on PGD examples. Resumes if OUT holds an unfinished run."""

    called: ClassVar[str] = "train classifier"

    out: Path = Path("runs/classifier")
    """Where the run is kept: checkpoint, log, options and the classifier."""
    method: ClassifierConfig = field(default_factory=ClassifierConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=30))

    def run(self) -> None:
        import torch

        from .._process import processes
        from ..training import ClassifierTask

        images = self.load_data()
        torch.manual_seed(self.loop.seed)
        model = self.fresh(images)
        train(self, ClassifierTask(model, self.method), images, self.loop, out=self.out, title="classifier")
        if processes()[0] == 0:
            finish_classifier(model, images, self.out, self.method.attack.eps, "classifier")
            print(f"saved to {self.out}")
