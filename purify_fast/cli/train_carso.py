"""``purify-fast train carso``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..methods.carso import CarsoConfig
from ..training import FitConfig
from .training import FollowsRecipe, TrainPurifier, saved_start

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..methods.base import Recipe
    from ..methods.carso import CarsoTask

_SIZES = ("layers", "cond_dim", "latent_dim", "samples", "decoder_width")


@dataclass(frozen=True)
class TrainCarso(FollowsRecipe, TrainPurifier):
    """Train CARSO's purifier on a saved classifier: with the paper's objective or through the pipeline. Resumes.

    Args:
        init: A saved CARSO to start from, as when fine-tuning through the pipeline; it brings its sizes.
        layers: Modules of the classifier whose outputs form the representation; the default is for small_cnn.
        cond_dim: Numbers of the condition that the representation is compressed to.
        latent_dim: Numbers of the latent that is drawn for each sample.
        samples: Reconstructions that are classified for each image.
        decoder_width: Channels of the decoder's widest layer, in multiples of the network's own.
    """

    called: ClassVar[str] = "train carso"
    of: ClassVar[str] = "carso"

    out: Path = Path("runs/carso")
    init: Path | None = None
    layers: tuple[str, ...] = ("conv2", "conv4", "hidden")
    cond_dim: int = 64
    latent_dim: int = 8
    samples: int = 8
    decoder_width: int = 8
    method: CarsoConfig = field(default_factory=CarsoConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=40, batch_size=64))

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        return {name: recipe[f"defence.{name}"] for name in _SIZES if name != "decoder_width"}

    def superseded(self) -> dict[tuple[str, ...], str]:
        if self.recipe is not None:
            message = "--recipe brings its own purifier: leave out --init and --decoder-width"
            return super().superseded() | {("init", "decoder_width"): message}
        if self.init is not None:
            return super().superseded() | {_SIZES: f"--init {self.init} brings its own sizes; leave out {{given}}"}
        return super().superseded()

    def task_on(self, classifier: nn.Module, images: DataSet) -> CarsoTask:
        from .._tensors import weights_fingerprint
        from ..methods.carso import Carso, CarsoTask

        if self.init is not None:
            defence = saved_start(self.init, Carso, classifier)
            return CarsoTask(defence, self.method, weights_fingerprint(defence))
        sizes: dict[str, Any] = {name: getattr(self, name) for name in _SIZES}
        if self.recipe is None:
            return CarsoTask(Carso(classifier, image_shape=images.image_shape, **sizes), self.method)
        del sizes["decoder_width"]
        return CarsoTask(self.published().defence(classifier, **sizes), self.method)
