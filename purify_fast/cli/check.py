"""The command ``purify-fast check``, which classifies the adversarial images of a report again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import tyro

from .._validation import Count, usable_device
from .command import Command
from .evaluate import Evaluate
from .parsing import parse
from .run_file import RUN_FILE, report_file

if TYPE_CHECKING:
    from ..data import DataSet
    from ..evaluation.show.witnesses import Witnesses


@dataclass(frozen=True)
class Check(Command):
    """Classify again the adversarial images of a report that `evaluate --keep all` wrote.

    The exit status is 1 if one of these images is classified correctly now (by a random model in all draws), has
    changed, or lies outside its ball.

    Args:
        report: Folder of the report, or of the run that was evaluated.
        model: Model that classifies, as in `evaluate`: a folder, zoo:NAME or your function. Default: that of run.yaml.
        batch_size: Number of images in one forward pass.
        seed: Seed of the draws of a random defence. Default: a seed that differs from the report's.
        device: Device to compute on: cpu, cuda, or another device of PyTorch. auto: a GPU if there is any.
    """

    called: ClassVar[str] = "check"

    report: tyro.conf.Positional[Path] = Path("runs/carso/evaluation")
    model: tyro.conf.Positional[str | None] = None
    batch_size: Count = 250
    seed: int | None = None
    device: str = "auto"

    def run(self) -> int:
        from ..evaluation.show.witnesses import check_witnesses, load_witnesses
        from ..speed.precision import float32_products

        folder = report_file(self.report, "report.json").parent
        device, whose = usable_device(self.device), self.evaluated(folder)
        witnesses, _ = load_witnesses(folder)
        model, _ = whose.prepared(images_of(witnesses, device))
        with float32_products(tf32=whose.precision == "tf32"):
            checked = check_witnesses(folder, model, batch_size=self.batch_size, seed=self.seed)
        print(checked.to_text())
        return 0 if checked.confirmed else 1

    def evaluated(self, folder: Path) -> Evaluate:
        """The `evaluate` command that wrote the report in a folder, with MODEL if given."""
        return parse(Evaluate, ["--config", str(folder / RUN_FILE)] if self.model is None else [self.model])


def images_of(witnesses: Witnesses, device: str) -> DataSet:
    """The clean images of a report as a data set, so that the original data set need not be on this machine."""
    from ..data import DataSet

    images = (witnesses.clean * 255).round().byte()
    parts = (images, witnesses.labels) * 2
    return DataSet(*parts, name="this report", num_classes=witnesses.about["classes"]).to(device)
