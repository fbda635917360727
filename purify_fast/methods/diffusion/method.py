"""The description of purification by diffusion, and the options of a denoiser's training and of a purifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...training import FitConfig
from ..trainings import Method, Training
from .config import DiffusionConfig, Solver

if TYPE_CHECKING:
    from ...data import DataSet
    from .task import DiffusionTask


@dataclass(frozen=True)
class TrainDiffusion(Training):
    """Train a denoiser for a diffusion purifier on clean images.

    No classifier is needed: `evaluate OUT --classifier FOLDER` combines both. An interrupted training continues if the
    same command is run again.

    Args:
        width: Number of channels of the U-Net at full size: a multiple of 16, or an even number below 16.
        patch: Side of the squares of pixels that become channels of the U-Net. 2 takes a quarter of the operations of
            1.
        attention: Use attention over all positions at the lowest level of the U-Net.
    """

    called: ClassVar[str] = "train diffusion"
    measured: ClassVar[tuple[str, int]] = ("", 0)

    out: Path = Path("runs/denoiser")
    width: int = 32
    patch: int = 1
    attention: bool = True
    method: DiffusionConfig = field(default_factory=DiffusionConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=100, batch_size=64))

    def task(self, images: DataSet, classifier: Any) -> DiffusionTask:
        from ...models import UNet
        from .task import DiffusionTask

        network = UNet(images.image_shape[0], self.width, patch=self.patch, attention=self.attention)
        return DiffusionTask(network.to(images.y_train.device), self.method)

    def save(self, trained: Any, images: DataSet) -> None:
        from .denoiser import save_denoiser

        process = {"schedule": self.method.noise_schedule, "prediction": self.method.prediction}
        save_denoiser(trained, self.out, images.image_shape, process, last_time=self.method.last_time)


@dataclass(frozen=True)
class ProcessOptions:
    """The options of a diffusion purifier's process.

    Args:
        t_star: For a diffusion purifier: time t* up to which noise is added, as a share of the diffusion process.
            Several numbers mean several rounds of purification. Default: the saved time, or 0.1.
        denoising_steps: For a diffusion purifier: number of steps of the solver from t* back to 0, or a number for each
            round. Default: the saved number, or all steps of the training's process.
        solver: For a diffusion purifier: solver that removes the noise. Default: the saved solver, or ddpm.
    """

    t_star: tuple[float, ...] = ()
    denoising_steps: tuple[int, ...] = ()
    solver: Solver | None = None

    def changes(self) -> dict[str, Any]:
        """The fields of the process that --t-star, --denoising-steps and --solver set."""
        times, steps = (given[0] if len(given) == 1 else given for given in (self.t_star, self.denoising_steps))
        process = {"t_star": times, "steps": steps, "solver": self.solver}
        process = {name: value for name, value in process.items() if value not in ((), None)}
        return {"process": process} if process else {}


METHOD = Method(
    (TrainDiffusion,),
    defence="DiffusionPurifier",
    parts={"Denoiser": "denoiser.module."},
    loading=ProcessOptions,
    recipes=True,
)
