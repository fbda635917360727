"""``purify-fast train diffusion``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..methods.diffusion.config import DiffusionConfig
from ..training import FitConfig
from .training import Training

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..training import Task


@dataclass(frozen=True)
class TrainDiffusion(Training):
    """Train a denoiser, a small U-Net, for a diffusion purifier; it needs no classifier. Resumes an unfinished run.

    `evaluate OUT --classifier FOLDER` puts it before a classifier and attacks both.

    Args:
        width: Channels of the U-Net at full size, at most 16 or a multiple of 16.
        patch: Side of the squares of pixels that the U-Net takes as one: 2 is four times faster than 1.
        attention: Let the U-Net's lowest level attend to all of its positions.
    """

    called: ClassVar[str] = "train diffusion"

    out: Path = Path("runs/denoiser")
    width: int = 32
    patch: int = 1
    attention: bool = True
    method: DiffusionConfig = field(default_factory=DiffusionConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=100, batch_size=64))

    def denoiser(self, images: DataSet) -> nn.Module:
        """The U-Net with fresh weights, on the images' device."""
        from ..models import UNet

        network = UNet(images.image_shape[0], self.width, patch=self.patch, attention=self.attention)
        return network.to(images.y_train.device)

    def task(self, images: DataSet) -> Task:
        import torch

        from ..methods.diffusion.task import DiffusionTask

        torch.manual_seed(self.loop.seed)
        return DiffusionTask(self.denoiser(images), self.method)

    def save(self, trained: Any, images: DataSet) -> None:
        from ..methods.diffusion.task import save_denoiser

        save_denoiser(trained, self.out, images.image_shape, self.method)
