"""``purify-fast ablate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from ..methods.arrest import AblationConfig, ArrestConfig
from ..training import FitConfig
from .classifiers import fresh_classifier
from .config_file import write_run_file
from .data_args import DataCommand


@dataclass(frozen=True)
class Ablate(DataCommand):
    """Adversarial training, finetuning, distillation and replay, each trained and attacked; a table and a plot.

    Resumes; over lists of lambda (--weights) and of the replay's threshold, phi (--angles) or tau (--taus). --epochs
    are those of finetuning: the standard classifier and training from scratch have --standard-epochs, --scratch-epochs.
    """

    called: ClassVar[str] = "ablate"

    what: tyro.conf.Positional[Literal["arrest"]] = "arrest"
    """The method whose parts are compared."""
    out: Path = Path("runs/ablation")
    """Where the table, the plot and a folder for each row are kept."""
    model: str = "small_cnn"
    """small_cnn, preact_resnet18, wide_resnet, fully_connected, torchvision:NAME, timm:NAME or
    package.module:function."""
    width: int | None = None
    """Channels of the first stage (small_cnn 16, preact_resnet18 64), or wide_resnet's factor (10)."""
    depth: int | None = None
    """Layers of a wide_resnet (28)."""
    rows: AblationConfig = field(default_factory=AblationConfig)
    method: ArrestConfig = field(default_factory=ArrestConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=20))

    def run(self) -> None:
        # PyTorch takes 1.8 seconds to import: --help does without it
        from ..methods.arrest import ablate

        images = self.load_data()
        made = ablate(
            lambda: fresh_classifier(self.model, images, width=self.width, depth=self.depth),
            images,
            self.method,
            self.rows,
            loop=self.loop,
            out=self.out,
        )
        write_run_file(self, self.out)
        print(made[0].read_text())
        print(f"written: {made[0]}, {' and '.join(path.name for path in made[1:])} beside it; rows in folders there")
