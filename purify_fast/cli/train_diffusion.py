"""The command ``purify-fast train diffusion``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..methods.diffusion.config import DiffusionConfig
from ..training import FitConfig
from .saved_models import saved_folder
from .training import Training

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..training import Task


@dataclass(frozen=True)
class TrainDiffusion(Training):
    """Train a denoiser for a diffusion purifier: on clean images, or by distillation.

    No classifier is needed: `evaluate OUT --classifier FOLDER` combines both. With --intervals, the denoiser of --init
    is distilled into a denoiser that is evaluated only once per image. An interrupted training continues if the same
    command is run again.

    Args:
        init: Folder that this command wrote before, or zoo:NAME. Its denoiser is distilled.
        width: Number of channels of the U-Net at full size: a multiple of 16, or an even number below 16.
        patch: Side of the squares of pixels that become channels of the U-Net. 2 takes a quarter of the operations of
            1.
        attention: Use attention over all positions at the lowest level of the U-Net.
    """

    called: ClassVar[str] = "train diffusion"
    only_with: ClassVar = {"intervals": ("init",)}
    set_by: ClassVar = {"intervals": ("width", "patch", "attention", "noise_schedule", "prediction")}

    out: Path = Path("runs/denoiser")
    init: Path | None = None
    width: int = 32
    patch: int = 1
    attention: bool = True
    method: DiffusionConfig = field(default_factory=DiffusionConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=100, batch_size=64))

    def task(self, images: DataSet) -> Task:
        import torch

        from ..methods.diffusion import DiffusionTask
        from ..models import UNet

        torch.manual_seed(self.loop.seed)
        if self.method.intervals:
            return self.distillation(images)
        network = UNet(images.image_shape[0], self.width, patch=self.patch, attention=self.attention)
        return DiffusionTask(network.to(images.y_train.device), self.method)

    def distillation(self, images: DataSet) -> Task:
        """Make the task that distills a denoiser into a denoiser that is evaluated only once."""
        from .._tensors import weights_fingerprint
        from ..methods.diffusion import ConsistencyTask

        denoiser, saved = self.saved_denoiser()
        if self.method.last_time > saved["last_time"]:
            raise ValueError(
                f"--last-time must be at most {saved['last_time']}, because the denoiser of {self.init} was not "
                f"trained for later times, got {self.method.last_time}"
            )
        origin = weights_fingerprint(denoiser)
        return ConsistencyTask(denoiser.to(images.y_train.device), self.method, origin, process=saved["process"])

    def saved_denoiser(self) -> tuple[nn.Module, dict[str, Any]]:
        """Load the denoiser of --init and its saved settings."""
        from ..methods.diffusion.denoiser import read_denoiser

        if self.init is None:
            raise ValueError(f"--intervals {self.method.intervals} distills a denoiser: give the denoiser by --init")
        return read_denoiser(saved_folder(self.init))

    def save(self, trained: Any, images: DataSet) -> None:
        from ..methods.diffusion import save_denoiser

        process: dict[str, Any] = {"schedule": self.method.noise_schedule, "prediction": self.method.prediction}
        if self.method.intervals:
            saved = self.saved_denoiser()[1]["process"]
            process = {name: saved[name] for name in ("schedule", "prediction", "times") if name in saved}
            process["solver"] = "one_shot"
        save_denoiser(trained, self.out, images.image_shape, process, last_time=self.method.last_time)
