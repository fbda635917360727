"""``purify-fast train generator`` and ``purify-fast train atop``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from ..methods.atop import AtopConfig
from ..training import FitConfig
from .classifiers import trained_classifier
from .command import Superseded
from .data_args import DataCommand
from .training import images_in_turn, say_other_ball, train_defence

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..methods.atop import Atop
    from ..methods.atop.recipes import AtopRecipe

_NETWORK = ("purifier", "width", "residual", "weights")
_TRANSFORM = ("transform", "sigma", "block", "mask_ratio", "num_passes", "samples", "aggregation", "shared_mask")


@dataclass(frozen=True)
class TrainGenerator(DataCommand):
    """Pre-train AToP's purifier on clean images: hinge GAN and L1. Resumes an unfinished run."""

    called: ClassVar[str] = "train generator"

    classifier: str = "runs/classifier"
    """A folder that `train classifier` wrote, or a classifier by name as in `train atop`: pre-training does not use it,
    but what is saved names it."""
    classifier_weights: str | None = None
    """Weights of a classifier by name: a .safetensors or .pth file, of which only tensors are read; or what the library
    calls weights that it has downloaded before, such as IMAGENET1K_V1, or pretrained of timm."""
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

    def run(self) -> None:
        # PyTorch takes 1.8 seconds to import: --help does without it
        import torch

        # and so does what imports it
        from ..methods.atop import AtopTask

        images = images_in_turn(self, self.published())
        classifier = trained_classifier(self.classifier, self.classifier_weights, images)
        torch.manual_seed(self.loop.seed)
        defence, origin = self.made(images, classifier)
        task = AtopTask(defence, self.method, origin)
        if train_defence(self, images, task, defence, self.loop, out=self.out, title="atop"):
            print(self.attacked_by(self.out, self.method.attack.eps, self.method.attack.norm))

    def published(self) -> AtopRecipe | None:
        """The published training that is followed; pre-training has none."""
        return None

    def made(self, images: DataSet, classifier: nn.Module) -> tuple[Atop, str]:
        """The defence to train, and what its purifier starts from."""
        # PyTorch takes 1.8 seconds to import: --help does without it
        from .._fingerprint import weights_fingerprint
        from ..methods.atop import Atop, DeepFillGenerator
        from ..methods.atop.purifier import build_purifier

        chosen = {name: getattr(self, name) for name in _TRANSFORM}
        if self.weights is None:
            purifier = build_purifier(self.purifier, images.image_shape, width=self.width, residual=self.residual)
            return Atop(classifier, purifier, images.image_shape, **chosen), "scratch"
        if self.purifier != "deepfill" or self.width is not None or self.residual:
            raise ValueError(f"--weights {self.weights} goes with --purifier deepfill, and brings its width")
        purifier = DeepFillGenerator.from_official(self.weights)
        return Atop(classifier, purifier, images.image_shape, **chosen), weights_fingerprint(purifier)


@dataclass(frozen=True)
class TrainAtop(TrainGenerator):
    """Fine-tune a purifier on a frozen classifier, with the paper's objective or through the pipeline. Resumes."""

    called: ClassVar[str] = "train atop"

    classifier: str = "runs/classifier"
    """A folder that `train classifier` or `train arrest` wrote; or a classifier by name:
    torchvision:resnet18, timm:resnet18, or package.module:function of yours."""
    out: Path = Path("runs/atop")
    """Where the run is kept: checkpoint, log, options and the defence."""
    recipe: str | None = None
    """A published training: cifar_rt1, cifar_rt2, logged, imagenette or imagenette_rt1; its numbers become this
    command's defaults. It starts from --weights, which the authors take from Places2, or from --init.
    `purify-fast recipe` prints the numbers with their sources."""
    official_code: bool = False
    """With --recipe: as its code runs it, with one mask for a batch and a doubled range in the cross-entropy."""
    init: Path | None = Path("runs/generator")
    """A folder that `train generator` or `train atop` wrote; it brings network and transform. None: from scratch."""
    method: AtopConfig = field(default_factory=AtopConfig)

    @staticmethod
    def of_recipe(name: str, official_code: bool) -> TrainAtop:
        """This command with the numbers of a recipe.

        Args:
            name: of the recipe, with or without the method.
            official_code: take the training's numbers as the official code runs them.
        """
        # PyTorch takes 1.8 seconds to import: --help does without it, unless a recipe is asked for
        from ..methods.atop.recipes import training

        made = training(name)
        return TrainAtop(
            recipe=made.name, official_code=official_code, data=made["data.name"], size=made.image_shape[1:],
            purifier="deepfill", init=None, method=made.config(official_code), loop=made.loop(official_code),
            **made.part("defence", official_code),
        )  # fmt: skip

    def superseded(self) -> list[Superseded]:
        found = []
        if self.recipe is None:
            found.append(Superseded(("official_code",), "--official-code is of a --recipe: name one"))
        if self.init is None:
            return found
        message = (
            f"--init {self.init} brings its own network and transform; leave out {{given}}, or start from scratch with "
            "--init None"
        )
        return [*found, Superseded(_NETWORK + _TRANSFORM, message)]

    def published(self) -> AtopRecipe | None:
        # PyTorch takes 1.8 seconds to import: --help does without it, unless a recipe is asked for
        from ..methods.atop.recipes import training

        return None if self.recipe is None else training(self.recipe)

    def made(self, images: DataSet, classifier: nn.Module) -> tuple[Atop, str]:
        if self.method.attack_method != "none":
            say_other_ball(self.classifier, self.method.attack)
        if self.init is None:
            return super().made(images, classifier)
        # PyTorch takes 1.8 seconds to import: --help does without it
        from .._fingerprint import weights_fingerprint
        from ..methods.atop import Atop, load_atop

        # pre-training saw no classifier, so that another than the saved one is as good
        defence = load_atop(self.init, classifier, check=False)
        if self.recipe is not None:
            # the recipe says how images are transformed, the folder brings the purifier alone
            chosen = {name: getattr(self, name) for name in _TRANSFORM}
            defence = Atop(classifier, defence.purifier.module, images.image_shape, **chosen)
        return defence, weights_fingerprint(defence.purifier)
