"""``purify-fast train generator`` and ``purify-fast train atop``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..methods.atop import AtopConfig
from ..training import FitConfig
from .command import Superseded
from .training import FollowsRecipe, TrainPurifier, saved_start

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..methods.atop import AtopTask
    from ..methods.base import Recipe

_NETWORK = ("purifier", "width", "residual", "weights")
_TRANSFORM = ("transform", "sigma", "block", "mask_ratio", "num_passes", "samples", "aggregation", "shared_mask")


@dataclass(frozen=True)
class TrainGenerator(TrainPurifier):
    """Pre-train AToP's purifier on clean images: hinge GAN and L1. Resumes an unfinished run."""

    called: ClassVar[str] = "train generator"

    out: Path = Path("runs/generator")
    """Where the run is kept: checkpoint, log, options and the defence."""
    purifier: Literal["deepfill", "small_generator", "masked_autoencoder"] = "small_generator"
    """The purifier's network. deepfill is made for images of 256 x 256; it needs multiples of 8, its attention 128."""
    width: int | None = None
    """Width of the purifier's network; default: its own (small_generator 8, deepfill 48, masked_autoencoder 64)."""
    residual: bool = False
    """Let a small_generator correct the image in place of painting one."""
    weights: Path | None = None
    """A checkpoint of deepfillv2-pytorch that a deepfill starts from; only tensors are read from it."""
    transform: Literal["rt1", "rt2", "rt3"] = "rt2"
    """rt1 hides blocks, rt2 adds noise before, rt3 hides every block once in several passes."""
    sigma: float = 0.25
    """Standard deviation of the noise in image units."""
    block: int | None = None
    """Side of a block in pixels; default: what tiles the image and is nearest to an eighth of the height."""
    mask_ratio: float = 0.25
    """Share of the blocks that rt1 and rt2 hide."""
    num_passes: int = 4
    """Passes of rt3."""
    samples: int = 1
    """Draws of noise and mask per prediction."""
    aggregation: Literal["mean", "mean_softmax"] = "mean"
    """How the draws become one prediction: mean of the logits, or logarithm of the mean of their softmax."""
    shared_mask: bool = False
    """Draw one mask for the whole batch, as in the official code."""
    method: AtopConfig = field(default_factory=AtopConfig.pretraining)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=40, batch_size=16))

    def task(self, images: DataSet, classifier: nn.Module) -> AtopTask:
        from .._tensors import weights_fingerprint
        from ..methods.atop import Atop, AtopTask, DeepFillGenerator
        from ..methods.atop.purifier import build_purifier

        if self.weights is None:
            purifier = build_purifier(self.purifier, images.image_shape, width=self.width, residual=self.residual)
        elif self.purifier != "deepfill" or self.width is not None or self.residual:
            raise ValueError(f"--weights {self.weights} goes with --purifier deepfill, and brings its width")
        else:
            purifier = DeepFillGenerator.from_official(self.weights)
        origin = "scratch" if self.weights is None else weights_fingerprint(purifier)
        return AtopTask(Atop(classifier, purifier, images.image_shape, **self.transform_options()), self.method, origin)

    def transform_options(self) -> dict[str, Any]:
        """How images are transformed, as `Atop` takes it."""
        return {name: getattr(self, name) for name in _TRANSFORM}


@dataclass(frozen=True)
class TrainAtop(FollowsRecipe, TrainGenerator):
    """Fine-tune a purifier on a frozen classifier, with the paper's objective or through the pipeline. Resumes."""

    called: ClassVar[str] = "train atop"
    of: ClassVar[str] = "atop"

    out: Path = Path("runs/atop")
    """Where the run is kept: checkpoint, log, options and the defence."""
    init: Path | None = Path("runs/generator")
    """A folder that `train generator` or `train atop` wrote; it brings network and transform. None: from scratch."""
    method: AtopConfig = field(default_factory=AtopConfig)

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        # the authors start from weights of Places2, which --weights gives
        options = {"size": recipe.image_shape[1:], "purifier": "deepfill", "init": None}
        return options | recipe.part("defence", official_code)

    def superseded(self) -> list[Superseded]:
        if self.init is None:
            return super().superseded()
        message = (
            f"--init {self.init} brings its own network and transform; leave out {{given}}, or start from scratch with "
            "--init None"
        )
        return [*super().superseded(), Superseded(_NETWORK + _TRANSFORM, message)]

    def task(self, images: DataSet, classifier: nn.Module) -> AtopTask:
        from .._tensors import weights_fingerprint
        from ..methods.atop import Atop, AtopTask

        if self.init is None:
            return super().task(images, classifier)
        # pre-training saw no classifier, so that another than the saved one is as good
        defence = saved_start(self.init, Atop, classifier, check=False)
        if self.recipe is not None:
            # the recipe says how images are transformed, the folder brings the purifier alone
            defence = Atop(classifier, defence.purifier.module, images.image_shape, **self.transform_options())
        return AtopTask(defence, self.method, weights_fingerprint(defence.purifier))
