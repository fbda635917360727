"""``purify-fast train carso``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..methods.carso import CarsoConfig
from ..training import FitConfig
from .command import Superseded
from .training import FollowsRecipe, TrainPurifier, saved_start

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..methods.base import Recipe
    from ..methods.carso import CarsoTask

_SIZES = ("layers", "cond_dim", "latent_dim", "samples", "decoder_width")


@dataclass(frozen=True)
class TrainCarso(FollowsRecipe, TrainPurifier):
    """Train CARSO's purifier on a saved classifier: with the paper's objective or through the pipeline. Resumes."""

    called: ClassVar[str] = "train carso"
    of: ClassVar[str] = "carso"

    out: Path = Path("runs/carso")
    """Where the run is kept: checkpoint, log, options and the defence."""
    init: Path | None = None
    """A saved CARSO to start from, as when fine-tuning through the pipeline; it brings its sizes."""
    layers: tuple[str, ...] = ("conv2", "conv4", "hidden")
    """Modules of the classifier whose outputs form the representation; the default is for small_cnn."""
    cond_dim: int = 64
    """Numbers of the condition that the representation is compressed to."""
    latent_dim: int = 8
    """Numbers of the latent that is drawn for each sample."""
    samples: int = 8
    """Reconstructions that are classified for each image."""
    decoder_width: int = 8
    """Channels of the decoder's widest layer, in multiples of the network's own."""
    method: CarsoConfig = field(default_factory=CarsoConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=40, batch_size=64))

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        return {name: recipe[f"defence.{name}"] for name in _SIZES if name != "decoder_width"}

    def superseded(self) -> list[Superseded]:
        rules = super().superseded()
        if self.recipe is not None:
            own = "--recipe brings its own purifier: leave out --init and --decoder-width"
            rules.append(Superseded(("init", "decoder_width"), own))
        elif self.init is not None:
            rules.append(Superseded(_SIZES, f"--init {self.init} brings its own sizes; leave out {{given}}"))
        return rules

    def task(self, images: DataSet, classifier: nn.Module) -> CarsoTask:
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
