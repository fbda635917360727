"""``purify-fast train arrest``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..methods.arrest import ArrestConfig
from ..training import ClassifierConfig, FitConfig
from .classifiers import fresh_classifier, trained_classifier
from .command import Superseded
from .config_file import RunFile
from .data_args import DataCommand
from .training import finish_classifier, images_in_turn

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet


@dataclass(frozen=True)
class TrainArrest(DataCommand):
    """Finetune a standardly trained classifier adversarially, near its old representation. Resumes an unfinished run.

    Writes a classifier, which `evaluate` attacks and on which `train carso` and `train atop` build.
    """

    called: ClassVar[str] = "train arrest"

    out: Path = Path("runs/arrest")
    """Where the run is kept: checkpoint, log, options and the classifier."""
    classifier: str | None = None
    """A folder with a standardly trained classifier, by `train classifier`; or one by name: torchvision:resnet18,
    timm:resnet18, or package.module:function of yours. None: train one first, to OUT/standard."""
    classifier_weights: str | None = None
    """Weights of a classifier by name: a .safetensors or .pth file, of which only tensors are read; or what the library
    calls weights that it has downloaded before, such as IMAGENET1K_V1, or pretrained of timm."""
    recipe: str | None = None
    """A published training: resnet18 or wrn_34_10; its numbers become this command's defaults.
    `purify-fast recipe` prints them with their sources."""
    official_code: bool = False
    """With --recipe: as the re-implementation runs it, with PGD that starts near the image, a drift test in training
    mode, and a pooled representation."""
    model: str = "small_cnn"
    """The classifier to train first: small_cnn, preact_resnet18, wide_resnet, fully_connected, torchvision:NAME,
    timm:NAME or package.module:function."""
    width: int | None = None
    """Channels of that classifier's first stage (small_cnn 16, preact_resnet18 64), or wide_resnet's factor (10)."""
    depth: int | None = None
    """Layers of that classifier, if it is a wide_resnet (28)."""
    activation: Literal["silu", "relu"] | None = None
    """Activation of that classifier, if it is a wide_resnet (silu)."""
    standard_epochs: int = 100
    """Epochs of that classifier's training; 100 are what a re-implementation of the paper says."""
    layers: tuple[str, ...] = ()
    """Modules whose outputs are the representation; default: the map before pooling."""
    keep_teacher: bool = False
    """Read the old representation of all images once and hold it in memory; not with augmentation."""
    method: ArrestConfig = field(default_factory=ArrestConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=20))

    @staticmethod
    def of_recipe(name: str, official_code: bool) -> TrainArrest:
        """This command with the numbers of a recipe.

        Args:
            name: of the recipe, with or without the method.
            official_code: take the training's numbers as the re-implementation runs them.
        """
        # PyTorch takes 1.8 seconds to import: --help does without it, unless a recipe is asked for
        from ..methods.arrest.recipes import finetuning

        made = finetuning(name)
        network = made.part("classifier")
        return TrainArrest(
            recipe=made.name, official_code=official_code, data=made["data.name"], model=network.pop("name"),
            method=made.config(official_code), loop=made.loop(official_code), **network,
        )  # fmt: skip

    def superseded(self) -> list[Superseded]:
        found = []
        if self.recipe is None:
            found.append(Superseded(("official_code",), "--official-code is of a --recipe: name one"))
        if self.classifier is not None:
            message = f"--classifier {self.classifier} is trained already: leave out {{given}}"
            found.append(Superseded(("model", "width", "depth", "activation", "standard_epochs"), message))
        return found

    def run(self) -> None:
        # PyTorch takes 1.8 seconds to import: --help does without it
        from .._process import processes
        from ..methods.arrest import ArrestTask
        from ..methods.arrest.recipes import finetuning
        from ..training import fit, summary

        if self.keep_teacher and (self.loop.padding or self.loop.flip):
            raise ValueError("--keep-teacher is for images that are not augmented: leave out --padding and --flip")
        images = images_in_turn(self, None if self.recipe is None else finetuning(self.recipe))
        model = self.start(images)
        task = ArrestTask(model, self.method, images.image_shape, self.layers or None)
        if self.keep_teacher and task.teacher is not None:
            task.teacher.keep(images.x_train, progress=processes()[0] == 0)
        last = fit(
            task,
            images.x_train,
            images.y_train,
            self.loop,
            folder=self.out,
            title="arrest",
            callbacks=[RunFile(self, self.out)],
        )
        if processes()[0] > 0:
            return
        print(summary(last))
        finish_classifier(task.result, images, self.out, self.method.attack.eps, "arrest")
        print(self.attacked_by(self.out, self.method.attack.eps, self.method.attack.norm))

    def fitting(self, model: nn.Module, images: DataSet) -> nn.Module:
        """The classifier, if it fits the images and has the layers; refused before anything is trained, if not."""
        # PyTorch takes 1.8 seconds to import: --help does without it
        from ..methods.arrest import Teacher
        from ..models.classifiers import representation_before_pooling

        layers = self.layers or (representation_before_pooling(model),)
        found = Teacher(model, layers, images.image_shape, self.method.pooled).reader.num_classes
        if images.num_classes > found:
            raise ValueError(f"--data {self.data}: it has {images.num_classes} classes, the classifier {found}")
        return model

    def start(self, images: DataSet) -> nn.Module:
        """The standardly trained classifier."""
        # PyTorch takes 1.8 seconds to import: --help does without it
        import torch

        # and so does what imports it
        from .._process import processes
        from ..training import ClassifierTask, fit, save_classifier

        if self.classifier is not None:
            return self.fitting(trained_classifier(self.classifier, self.classifier_weights, images), images)
        self.refuse_another_run()
        torch.manual_seed(self.loop.seed)
        sizes: dict[str, Any] = {"width": self.width, "depth": self.depth, "activation": self.activation}
        model = self.fitting(fresh_classifier(self.model, images, **sizes), images)
        loop = replace(self.loop, epochs=self.standard_epochs)
        folder = self.out / "standard"
        fit(
            ClassifierTask(model, ClassifierConfig()),
            images.x_train,
            images.y_train,
            loop,
            folder=folder,
            title="standard",
        )
        if processes()[0] == 0:
            save_classifier(model, folder)
        return model

    def refuse_another_run(self) -> None:
        """ValueError if OUT holds another run, before the standard classifier is trained into it for minutes."""
        # PyTorch takes 1.8 seconds to import: --help does without it
        from ..training.attack import settings
        from ..training.checkpoint import last_checkpoint
        from ..training.run import loop_facts, refuse_another

        found = last_checkpoint(self.out)
        if found is None:
            return
        saved = found["facts"]
        attack = self.method.attack
        wanted = {"task": "arrest", **settings(self.method), **loop_facts(self.loop)}
        wanted["alpha"] = attack.step_size(attack.eps)
        refuse_another(self.out, {name: saved.get(name) for name in wanted}, wanted)
