"""The commands that train purifiers: ``purify-fast train carso``, ``train generator`` and ``train atop``."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .._validation import Count, Share
from ..methods.atop import AtopConfig
from ..methods.carso import CarsoConfig
from ..training import FitConfig
from .saved_models import refuse_other_images
from .training import FollowsRecipe, OnClassifier, Training

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..methods.atop import AtopTask
    from ..methods.carso import CarsoTask
    from ..methods.publication import Recipe
    from ..methods.purifier_task import PurifierTask
    from ..training import BankConfig

_SIZES = ("layers", "cond_dim", "latent_dim", "samples", "decoder_width")
_NETWORK = ("purifier", "width", "residual", "weights")
_TRANSFORM = ("transform", "sigma", "block", "mask_ratio", "num_passes", "samples", "aggregation", "shared_mask")


@dataclass(frozen=True)
class TrainPurifier(OnClassifier):
    """A command that trains a purifier for a classifier that is already trained."""

    classifier: str = "runs/classifier"

    @abstractmethod
    def task_on(self, classifier: nn.Module, images: DataSet) -> PurifierTask[Any]:
        """Make the task that trains the defence."""

    def task(self, images: DataSet) -> PurifierTask[Any]:
        import torch

        classifier = self.given_classifier(images)
        torch.manual_seed(self.loop.seed)
        task = self.task_on(classifier, images)
        refuse_other_images(task.defence, images, "the purifier")
        return task

    def save(self, trained: Any, images: DataSet) -> None:
        from ..training import save_classifier

        trained.save(self.out)
        save_classifier(trained.classifier, self.out / "classifier", images.classes)
        print("the trained weights were not tested on the held-out images of the data set")


@dataclass(frozen=True)
class KeepsAttacks(Training):
    """A command that can save its attacked images in a file, called adversarial bank, and train on them again.

    Args:
        bank: Save up to this number of attacked versions ("variants") of each image in a file, and train on them again
            in later epochs instead of attacking. Needs the paper's objective, which attacks only the classifier.
            Default: attack in every step.
        bank_refresh: With --bank: share of the adversarial images that are attacked again, to replace the oldest.
        bank_folder: With --bank: folder of the file, also for later runs. Default: banks in the folder of caches.
    """

    only_with: ClassVar = {"bank": ("bank_refresh", "bank_folder")}

    bank: Count | None = None
    bank_refresh: Share = 0.05
    bank_folder: Path | None = None

    def bank_config(self) -> BankConfig | None:
        from ..training import BankConfig

        return None if self.bank is None else BankConfig(self.bank, self.bank_refresh, self.bank_folder)


@dataclass(frozen=True)
class TrainCarso(KeepsAttacks, FollowsRecipe, TrainPurifier):
    """Train CARSO's purifier on a saved classifier, with the paper's objective or through the pipeline.

    An interrupted training continues if the same command is run again.

    Args:
        init: Folder of a saved CARSO from which the training starts, such as to fine-tune it. It sets the sizes.
        layers: Names of the classifier's layers whose outputs form the representation. The default is for small_cnn.
        cond_dim: Size of the condition, the vector to which the representation is compressed.
        latent_dim: Size of the random latent vector of each sample.
        samples: Number of reconstructions that are classified for each image.
        decoder_width: Number of channels in the decoder's last hidden layer. Earlier layers have up to 8 times as many.
    """

    called: ClassVar[str] = "train carso"
    of: ClassVar[str] = "carso"
    set_by: ClassVar = {"init": _SIZES, "recipe": ("init", "decoder_width")}

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

    def task_on(self, classifier: nn.Module, images: DataSet) -> CarsoTask:
        from .._tensors import weights_fingerprint
        from ..methods.carso import Carso, CarsoTask

        if self.init is not None:
            defence = self.saved_start(self.init, classifier)
            return CarsoTask(defence, self.method, weights_fingerprint(defence))
        sizes: dict[str, Any] = {name: getattr(self, name) for name in _SIZES}
        if self.recipe is None:
            return CarsoTask(Carso(classifier, image_shape=images.image_shape, **sizes), self.method)
        del sizes["decoder_width"]
        return CarsoTask(self.adapted(images).defence(classifier, **sizes), self.method)


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
    set_by: ClassVar = {"weights": ("width", "residual")}

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

    def task_on(self, classifier: nn.Module, images: DataSet) -> AtopTask:
        from .._tensors import weights_fingerprint
        from ..methods.atop import Atop, AtopTask, DeepFillGenerator
        from ..methods.atop.purifier import build_purifier

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
    of: ClassVar[str] = "atop"
    set_by: ClassVar = {"init": _NETWORK + _TRANSFORM}

    out: Path = Path("runs/atop")
    init: Path | None = Path("runs/generator")
    method: AtopConfig = field(default_factory=AtopConfig)

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        # The authors start from weights that were trained on Places2. The user passes these weights as --weights.
        # The default side of a block is the recipe's, for images of the recipe's size.
        options = {"size": recipe.image_shape[1:], "purifier": "deepfill", "init": None}
        return options | recipe.part("defence", official_code) | {"block": None}

    def starts(self) -> dict[str, str]:
        start = self.weights if self.init is None else self.init
        return super().starts() | ({} if start is None else {"start.purifier": str(start)})

    def task_on(self, classifier: nn.Module, images: DataSet) -> AtopTask:
        from .._tensors import weights_fingerprint
        from ..methods.atop import Atop, AtopTask

        if self.init is None:
            return super().task_on(classifier, images)
        # Do not check that the classifier is the same, because the pre-training did not depend on its classifier.
        defence = self.saved_start(self.init, classifier, check=False)
        if self.recipe is not None:
            # The recipe sets the transform. Only the purifier is taken from the folder.
            defence = Atop(classifier, defence.purifier.module, images.image_shape, **self.transform_options())
        return AtopTask(defence, self.method, weights_fingerprint(defence.purifier))
