"""``purify-fast train carso``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..methods.carso import CarsoConfig
from ..training import FitConfig
from .classifiers import trained_classifier
from .command import Superseded
from .data_args import DataCommand
from .training import images_in_turn, say_other_ball, train_defence

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..methods.carso import Carso

_SIZES = ("layers", "cond_dim", "latent_dim", "samples", "decoder_width")


@dataclass(frozen=True)
class TrainCarso(DataCommand):
    """Train CARSO's purifier on a saved classifier: with the paper's objective or through the pipeline. Resumes."""

    called: ClassVar[str] = "train carso"

    classifier: str = "runs/classifier"
    """A folder that `train classifier` or `train arrest` wrote; or a classifier by name:
    torchvision:resnet18, timm:resnet18, or package.module:function of yours."""
    classifier_weights: str | None = None
    """Weights of a classifier by name: a .safetensors or .pth file, of which only tensors are read; or what the library
    calls weights that it has downloaded before, such as IMAGENET1K_V1, or pretrained of timm."""
    out: Path = Path("runs/carso")
    """Where the run is kept: checkpoint, log, options and the defence."""
    recipe: str | None = None
    """A published training: cifar10, cifar100, tiny_imagenet or mnist_v1; its numbers become this command's defaults.
    `purify-fast recipe` prints them with their sources."""
    official_code: bool = False
    """With --recipe: as its code runs it, which attacks with a larger eps, and never on TinyImageNet."""
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
    def of_recipe(name: str, official_code: bool) -> TrainCarso:
        """This command with the numbers of a recipe.

        Args:
            name: of the recipe, with or without the method.
            official_code: take the training's numbers as the official code runs them.
        """
        # PyTorch takes 1.8 seconds to import: --help does without it, unless a recipe is asked for
        from ..methods.carso.recipes import system

        made = system(name)
        sizes = {key: made[f"defence.{key}"] for key in ("layers", "cond_dim", "latent_dim", "samples")}
        return TrainCarso(
            recipe=made.name, official_code=official_code, data=made["data.name"], method=made.config(official_code),
            loop=made.loop(official_code), **sizes,
        )  # fmt: skip

    def superseded(self) -> list[Superseded]:
        found = []
        if self.recipe is not None:
            own = "--recipe brings its own purifier: leave out --init and --decoder-width"
            found.append(Superseded(("init", "decoder_width"), own))
        elif self.init is not None:
            found.append(Superseded(_SIZES, f"--init {self.init} brings its own sizes; leave out {{given}}"))
        if self.recipe is None:
            found.append(Superseded(("official_code",), "--official-code is of a --recipe: name one"))
        return found

    def run(self) -> None:
        # PyTorch takes 1.8 seconds to import: --help does without it
        import torch

        # and so does what imports it
        from ..methods.carso import CarsoTask
        from ..methods.carso.recipes import system

        images = images_in_turn(self, None if self.recipe is None else system(self.recipe))
        classifier = trained_classifier(self.classifier, self.classifier_weights, images)
        say_other_ball(self.classifier, self.method.attack)
        torch.manual_seed(self.loop.seed)
        defence, origin = self.made(images, classifier)
        task = CarsoTask(defence, self.method, origin)
        if train_defence(self, images, task, defence, self.loop, out=self.out, title="carso"):
            print(self.attacked_by(self.out, self.method.attack.eps, self.method.attack.norm))

    def made(self, images: DataSet, classifier: nn.Module) -> tuple[Carso, str]:
        """The defence to train, and what its purifier starts from."""
        # PyTorch takes 1.8 seconds to import: --help does without it
        from .._fingerprint import weights_fingerprint
        from ..methods.carso import Carso, load_carso
        from ..methods.carso.recipes import system

        if self.init is not None:
            defence = load_carso(self.init, classifier)
            return defence, weights_fingerprint(defence)
        sizes = {name: getattr(self, name) for name in _SIZES}
        if self.recipe is not None:
            del sizes["decoder_width"]
            return system(self.recipe).defence(classifier, **sizes), "scratch"
        return Carso(classifier, image_shape=images.image_shape, **sizes), "scratch"
