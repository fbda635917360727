"""``purify-fast train generator`` and ``purify-fast train atop``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..methods.atop import AtopConfig
from ..training import FitConfig
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
    """Pre-train AToP's purifier on clean images: hinge GAN and L1. Resumes an unfinished run.

    Args:
        purifier: The purifier's network. deepfill is made for images of 256 x 256; it needs multiples of 8, its
            attention 128.
        width: Width of the purifier's network; default: its own (small_generator 8, deepfill 48, masked_autoencoder
            64).
        residual: Let a small_generator correct the image in place of painting one.
        weights: A checkpoint of deepfillv2-pytorch that a deepfill starts from; only tensors are read from it.
        transform: rt1 hides blocks, rt2 adds noise before, rt3 hides every block once in several passes.
        sigma: Standard deviation of the noise in image units.
        block: Side of a block in pixels; default: what tiles the image and is nearest to an eighth of the height.
        mask_ratio: Share of the blocks that rt1 and rt2 hide.
        num_passes: Passes of rt3.
        samples: Draws of noise and mask per prediction.
        aggregation: How the draws become one prediction: mean of the logits, or logarithm of the mean of their softmax.
        shared_mask: Draw one mask for the whole batch, as in the official code.
    """

    called: ClassVar[str] = "train generator"

    out: Path = Path("runs/generator")
    purifier: Literal["deepfill", "small_generator", "masked_autoencoder"] = "small_generator"
    width: int | None = None
    residual: bool = False
    weights: Path | None = None
    transform: Literal["rt1", "rt2", "rt3"] = "rt2"
    sigma: float = 0.25
    block: int | None = None
    mask_ratio: float = 0.25
    num_passes: int = 4
    samples: int = 1
    aggregation: Literal["mean", "mean_softmax"] = "mean"
    shared_mask: bool = False
    method: AtopConfig = field(default_factory=AtopConfig.pretraining)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=40, batch_size=16))

    def task_on(self, classifier: nn.Module, images: DataSet) -> AtopTask:
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
    """Fine-tune a purifier on a frozen classifier, with the paper's objective or through the pipeline. Resumes.

    Args:
        init: A folder that `train generator` or `train atop` wrote; it brings network and transform. None: from
            scratch.
    """

    called: ClassVar[str] = "train atop"
    of: ClassVar[str] = "atop"

    out: Path = Path("runs/atop")
    init: Path | None = Path("runs/generator")
    method: AtopConfig = field(default_factory=AtopConfig)

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        # the authors start from weights of Places2, which --weights gives
        options = {"size": recipe.image_shape[1:], "purifier": "deepfill", "init": None}
        return options | recipe.part("defence", official_code)

    def superseded(self) -> dict[tuple[str, ...], str]:
        if self.init is None:
            return super().superseded()
        message = (
            f"--init {self.init} brings its own network and transform; leave out {{given}}, or start from scratch with "
            "--init None"
        )
        return super().superseded() | {_NETWORK + _TRANSFORM: message}

    def task_on(self, classifier: nn.Module, images: DataSet) -> AtopTask:
        from .._tensors import weights_fingerprint
        from ..methods.atop import Atop, AtopTask

        if self.init is None:
            return super().task_on(classifier, images)
        # pre-training saw no classifier, so that another than the saved one is as good
        defence = saved_start(self.init, Atop, classifier, check=False)
        if self.recipe is not None:
            # the recipe says how images are transformed, the folder brings the purifier alone
            defence = Atop(classifier, defence.purifier.module, images.image_shape, **self.transform_options())
        return AtopTask(defence, self.method, weights_fingerprint(defence.purifier))
