"""``purify-fast train carso``, ``purify-fast train generator`` and ``purify-fast train atop``."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .._validation import Count, Positive, Share
from ..methods.atop import AtopConfig
from ..methods.carso import CarsoConfig
from ..training import FitConfig
from .run_file import ball_of_run
from .saved_models import is_named, saved_folder, trained_classifier
from .training import FollowsRecipe, OnClassifier, Training

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..defences.base import Defence
    from ..methods.atop import AtopTask
    from ..methods.base import PurifierTask, Recipe
    from ..methods.carso import CarsoTask
    from ..training import BankConfig, TrainingAttack

_SIZES = ("layers", "cond_dim", "latent_dim", "samples", "decoder_width")
_NETWORK = ("purifier", "width", "residual", "weights")
_TRANSFORM = ("transform", "sigma", "block", "mask_ratio", "num_passes", "samples", "aggregation", "shared_mask")


@dataclass(frozen=True)
class TrainPurifier(OnClassifier):
    """A command that trains a defence's purifier on a classifier, which stays as it is."""

    classifier: str = "runs/classifier"

    @abstractmethod
    def task_on(self, classifier: nn.Module, images: DataSet) -> PurifierTask[Any]:
        """The training of the defence."""

    def task(self, images: DataSet) -> PurifierTask[Any]:
        import torch

        classifier = trained_classifier(self.classifier, self.classifier_weights, images)
        if getattr(self.method, "attack_method", None) != "none":
            say_other_ball(self.classifier, self.method.attack)
        torch.manual_seed(self.loop.seed)
        task = self.task_on(classifier, images)
        if images.image_shape != task.defence.image_shape:
            raise ValueError(
                f"--data {self.data} has images of {images.image_shape}, the purifier needs {task.defence.image_shape}"
            )
        return task

    def save(self, trained: Any, images: DataSet) -> None:
        from ..training import save_classifier

        trained.save(self.out)
        save_classifier(trained.classifier, self.out / "classifier")


@dataclass(frozen=True)
class KeepsAttacks(Training):
    """A command whose attacks on the frozen classifier can be kept.

    Args:
        bank: Keep up to so many attacked variants of each image in a file, and train on them again in later epochs in
            place of attacking; for the papers' objectives, which attack the classifier alone. Default: attack in every
            step.
        bank_refresh: With --bank: the share of the adversarial images that is attacked all the same, and takes the
            place of the oldest variants.
        bank_folder: With --bank: where the file is kept, for later runs too; default: banks in the folder of caches.
        bank_gigabytes: With --bank: the most that all banks in that folder may take.
    """

    bank: Count | None = None
    bank_refresh: Share = 0.05
    bank_folder: Path | None = None
    bank_gigabytes: Positive = 20.0

    def ignored_beside(self) -> dict[tuple[str, ...], str]:
        if self.bank is not None:
            return super().ignored_beside()
        names = ("bank_refresh", "bank_folder", "bank_gigabytes")
        return super().ignored_beside() | {names: "{given} needs --bank, the number of variants that are kept"}

    def bank_config(self) -> BankConfig | None:
        from ..training import BankConfig

        if self.bank is None:
            return None
        return BankConfig(self.bank, self.bank_refresh, self.bank_folder, self.bank_gigabytes)


@dataclass(frozen=True)
class TrainCarso(KeepsAttacks, FollowsRecipe, TrainPurifier):
    """Train CARSO's purifier on a saved classifier: with the paper's objective or through the pipeline. Resumes.

    Args:
        init: A saved CARSO to start from, as when fine-tuning through the pipeline; it sets the sizes.
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

    def ignored_beside(self) -> dict[tuple[str, ...], str]:
        if self.recipe is not None:
            message = "--recipe sets the purifier: leave out --init and --decoder-width"
            return super().ignored_beside() | {("init", "decoder_width"): message}
        if self.init is not None:
            return super().ignored_beside() | {_SIZES: f"--init {self.init} sets the sizes: leave out {{given}}"}
        return super().ignored_beside()

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
        try:
            return CarsoTask(self.published().defence(classifier, **sizes), self.method)
        except ValueError as error:
            raise ValueError(
                f"{error}. --recipe {self.recipe} names layers of its own classifier: name layers of yours with "
                f"--layers; for other classes {self.without_recipe()}"
            ) from error


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
            raise ValueError(
                "--weights needs --purifier deepfill without --width and --residual, which the weights set, got "
                f"--weights {self.weights}"
            )
        else:
            purifier = DeepFillGenerator.from_official(self.weights)
        origin = "scratch" if self.weights is None else weights_fingerprint(purifier)
        return AtopTask(Atop(classifier, purifier, images.image_shape, **self.transform_options()), self.method, origin)

    def transform_options(self) -> dict[str, Any]:
        """The options that transform images, by their names in `Atop`."""
        return {name: getattr(self, name) for name in _TRANSFORM}


@dataclass(frozen=True)
class TrainAtop(KeepsAttacks, FollowsRecipe, TrainGenerator):
    """Fine-tune a purifier on a frozen classifier, with the paper's objective or through the pipeline. Resumes.

    Args:
        init: A folder that `train generator` or `train atop` wrote; it sets the network and the transform. None: train
            from scratch.
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

    def ignored_beside(self) -> dict[tuple[str, ...], str]:
        if self.init is None:
            return super().ignored_beside()
        message = (
            f"--init {self.init} sets the network and the transform: leave out {{given}}, or start from scratch with "
            "--init None"
        )
        return super().ignored_beside() | {_NETWORK + _TRANSFORM: message}

    def task_on(self, classifier: nn.Module, images: DataSet) -> AtopTask:
        from .._tensors import weights_fingerprint
        from ..methods.atop import Atop, AtopTask

        if self.init is None:
            return super().task_on(classifier, images)
        # pre-training saw no classifier: any other classifier is as good as the saved one
        defence = saved_start(self.init, Atop, classifier, check=False)
        if self.recipe is not None:
            # the recipe sets the transform, and the folder only the purifier
            defence = Atop(classifier, defence.purifier.module, images.image_shape, **self.transform_options())
        return AtopTask(defence, self.method, weights_fingerprint(defence.purifier))


def saved_start(folder: Path, kind: type[Defence], classifier: nn.Module, **options: Any) -> Any:
    """The defence of a kind in a folder, to start from; ValueError if there is something else.

    ``options`` are further arguments of `purify_fast.load_defence`.
    """
    from ..methods.loading import load_defence

    defence = load_defence(folder, classifier, **options)
    if not isinstance(defence, kind):
        raise ValueError(f"{folder} holds a defence of the kind {type(defence).__name__}, not {kind.__name__}")
    return defence


def say_other_ball(classifier: str, attack: TrainingAttack) -> None:
    """Print a note if a defence is trained at another radius or norm than its classifier was.

    There is no note for a classifier by name, for one that was trained on clean images, or if no file names its radius.
    """
    if is_named(classifier):
        return
    try:
        ball = ball_of_run(saved_folder(classifier))
    except ValueError:
        # one can train on a classifier whose options are damaged
        return
    if ball is None or (math.isclose(ball[0], attack.eps, rel_tol=1e-4) and ball[1] == attack.norm):
        return
    eps, norm = ball
    same = f"--eps {eps:.6g}" + (f" --norm {norm}" if norm != attack.norm else "")
    print(
        f"note: {classifier} was trained at {norm} {eps:.6g}, and this trains at {attack.norm} {attack.eps:.6g}; "
        f"{same} gives both the same",
        file=sys.stderr,
    )
