"""``purify-fast train classifier``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ..training import ClassifierConfig, FitConfig
from .classifiers import fresh_classifier
from .config_file import RunFile
from .data_args import DataCommand
from .training import finish_classifier, images_in_turn


@dataclass(frozen=True)
class TrainClassifier(DataCommand):
    """Train a classifier: standard (eps 0) or on PGD examples. Resumes if OUT holds an unfinished run."""

    called: ClassVar[str] = "train classifier"

    out: Path = Path("runs/classifier")
    """Where the run is kept: checkpoint, log, options and the classifier."""
    model: str = "small_cnn"
    """small_cnn, preact_resnet18, wide_resnet, fully_connected, torchvision:NAME, timm:NAME or
    package.module:function."""
    width: int | None = None
    """Channels of the first stage (small_cnn 16, preact_resnet18 64), or wide_resnet's factor (10)."""
    depth: int | None = None
    """Layers of a wide_resnet (28)."""
    activation: Literal["silu", "relu"] | None = None
    """Activation of a wide_resnet (silu)."""
    method: ClassifierConfig = field(default_factory=ClassifierConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=30))

    def run(self) -> None:
        # PyTorch takes 1.8 seconds to import: --help does without it
        import torch

        # and so does what imports it
        from .._process import processes
        from ..training import ClassifierTask, fit, summary

        images = images_in_turn(self)
        torch.manual_seed(self.loop.seed)
        model = fresh_classifier(self.model, images, width=self.width, depth=self.depth, activation=self.activation)
        task = ClassifierTask(model, self.method)
        last = fit(
            task,
            images.x_train,
            images.y_train,
            self.loop,
            folder=self.out,
            title="classifier",
            callbacks=[RunFile(self, self.out)],
        )
        if processes()[0] > 0:
            return
        print(summary(last))
        finish_classifier(model, images, self.out, self.method.attack.eps, "classifier")
        print(f"saved to {self.out}")
