"""The description of AToP, and the options of its two trainings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...training import FitConfig
from ..trainings import FollowsRecipe, KeepsAttacks, Method, TrainPurifier, saved_start
from .config import AtopConfig

if TYPE_CHECKING:
    from ...data import DataSet
    from ..publication import Recipe
    from . import AtopTask

_GENERATOR = ("purifier", "width", "residual", "weights")
_TRANSFORM = ("transform", "sigma", "block", "mask_ratio", "num_passes", "samples", "aggregation", "shared_mask")


@dataclass(frozen=True)
class TrainGenerator(TrainPurifier):
    """Pre-train AToP's purifier on clean images, with a hinge GAN loss and an L1 loss.

    An interrupted training continues if the same command is run again.

    Args:
        purifier: Network of the purifier. deepfill was designed for images of 256 x 256, and needs sides that are
            multiples of 8. For sides below 128, use small_generator: deepfill's attention then has few keys.
        width: Width of the purifier's network. Default: 8 for small_generator, 48 for deepfill.
        residual: Let a small_generator predict a correction of the image instead of a new image.
        weights: Checkpoint of deepfillv2-pytorch from which a deepfill starts, whatever --purifier names. Only tensors
            are read from it.
        transform: Random transform before the purifier. rt1 hides blocks. rt2 adds noise and hides blocks. rt3 adds
            noise and makes several passes, so that every block is hidden once.
        sigma: Standard deviation of the noise, in image units.
        block: Side of a block in pixels. Default: the divisor of the image's sides nearest to an eighth of its height.
        mask_ratio: Share of the blocks that rt1 and rt2 hide.
        num_passes: Number of passes of rt3.
        samples: Number of draws of noise and mask per prediction.
        aggregation: Combination of the draws: mean (of the logits), or mean_softmax (logarithm of the mean softmax).
        shared_mask: Draw a single mask for the whole batch, like the official code.
    """

    called: ClassVar[str] = "train generator"
    no_effect: ClassVar = {("beside", "weights"): ("width", "residual")}

    out: Path = Path("runs/generator")
    purifier: Literal["deepfill", "small_generator"] = "small_generator"
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

    def task(self, images: DataSet, classifier: Any) -> AtopTask:
        from ..._hashes import weights_fingerprint
        from . import Atop, AtopTask, DeepFillGenerator, build_purifier

        if self.weights is None:
            purifier = build_purifier(self.purifier, images.image_shape[0], width=self.width, residual=self.residual)
        else:
            purifier = DeepFillGenerator.from_official(self.weights)
        origin = "scratch" if self.weights is None else weights_fingerprint(purifier)
        return AtopTask(Atop(classifier, purifier, images.image_shape, **self.transform_options()), self.method, origin)

    def transform_options(self) -> dict[str, Any]:
        """The options of the transform, by their names in `Atop`."""
        return {name: getattr(self, name) for name in _TRANSFORM}


@dataclass(frozen=True)
class TrainAtop(KeepsAttacks, FollowsRecipe, TrainGenerator):
    """Fine-tune AToP's purifier for a frozen classifier, with the paper's objective or through the pipeline.

    An interrupted training continues if the same command is run again.

    Args:
        init: Folder that `train generator` or `train atop` wrote, with its network and transform. None: random weights.
    """

    called: ClassVar[str] = "train atop"
    no_effect: ClassVar = {("beside", "init"): _GENERATOR + _TRANSFORM}

    out: Path = Path("runs/atop")
    init: Path | None = Path("runs/generator")
    method: AtopConfig = field(default_factory=AtopConfig)

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        # The authors start from weights that were trained on Places2. The user passes these weights as --weights.
        # The default side of a block is the recipe's, for images of the recipe's size.
        options = {"size": recipe.image_shape[1:], "purifier": "deepfill", "init": None}
        return options | recipe.part("defence", official_code) | {"block": None}

    def task(self, images: DataSet, classifier: Any) -> AtopTask:
        from ..._hashes import weights_fingerprint
        from . import Atop, AtopTask

        if self.init is None:
            return super().task(images, classifier)
        if not self.init.is_dir():
            advice = "run `purify-fast train generator` first, or give its folder as --init; None: random weights"
            raise FileNotFoundError(f"--init: {self.init} is missing: {advice}")
        # Do not check that the classifier is the same, because the pre-training did not depend on its classifier.
        defence = saved_start(Atop, self.init, classifier, check=False)
        if self.recipe is not None:
            # The recipe sets the transform. Only the purifier is taken from the folder.
            defence = Atop(classifier, defence.purifier.module, images.image_shape, **self.transform_options())
        return AtopTask(defence, self.method, weights_fingerprint(defence.purifier))


METHOD = Method((TrainGenerator, TrainAtop), defence="Atop", recipes=True)
