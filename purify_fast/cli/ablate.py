"""``purify-fast ablate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from ..methods.arrest import AblationConfig, ArrestConfig
from ..training import FitConfig
from .config_file import write_run_file
from .training import FreshClassifier


@dataclass(frozen=True)
class Ablate(FreshClassifier):
    """Adversarial training, finetuning, distillation and replay, each trained and attacked; a table and a plot.

    Resumes; over lists of lambda (--weights) and of the replay's threshold, phi (--angles) or tau (--taus). --epochs
    are those of finetuning: the standard classifier and training from scratch have --standard-epochs, --scratch-epochs.
    """

    called: ClassVar[str] = "ablate"

    what: tyro.conf.Positional[Literal["arrest"]] = "arrest"
    """The method whose parts are compared."""
    out: Path = Path("runs/ablation")
    """Where the table, the plot and a folder for each row are kept."""
    rows: AblationConfig = field(default_factory=AblationConfig)
    method: ArrestConfig = field(default_factory=ArrestConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=20))

    def run(self) -> None:
        from ..methods.arrest import ablate

        images = self.load_data()
        table, *others = ablate(
            lambda: self.fresh(images), images, self.method, self.rows, loop=self.loop, out=self.out
        )
        write_run_file(self, self.out)
        print(table.read_text())
        print(f"written: {table}, {' and '.join(path.name for path in others)} beside it; rows in folders there")
