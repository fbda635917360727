"""``purify-fast train arrest``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..methods.arrest import ArrestConfig
from ..training import ClassifierConfig, FitConfig
from .classifiers import trained_classifier
from .command import Superseded
from .training import FollowsRecipe, FreshClassifier, finish_classifier, train

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..methods.base import Recipe


@dataclass(frozen=True)
class TrainArrest(FollowsRecipe, FreshClassifier):
    """Finetune a standardly trained classifier adversarially, near its old representation. Resumes an unfinished run.

    Writes a classifier, which `evaluate` attacks and on which `train carso` and `train atop` build.
    """

    called: ClassVar[str] = "train arrest"
    of: ClassVar[str] = "arrest"

    out: Path = Path("runs/arrest")
    """Where the run is kept: checkpoint, log, options and the classifier."""
    classifier: str | None = None
    """A folder with a standardly trained classifier, by `train classifier`; or one by name: torchvision:resnet18,
    timm:resnet18, or package.module:function of yours. None: train one first, to OUT/standard."""
    classifier_weights: str | None = None
    """Weights of a classifier by name: a .safetensors or .pth file, of which only tensors are read; or what the library
    calls weights that it has downloaded before, such as IMAGENET1K_V1, or pretrained of timm."""
    standard_epochs: int = 100
    """Epochs of the standard classifier's training; 100 are what a re-implementation of the paper says."""
    layers: tuple[str, ...] = ()
    """Modules whose outputs are the representation; default: the map before pooling."""
    keep_teacher: bool = False
    """Read the old representation of all images once and hold it in memory; not with augmentation."""
    method: ArrestConfig = field(default_factory=ArrestConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=20))

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        network = recipe.part("classifier")
        return {"model": network.pop("name"), **network}

    def superseded(self) -> list[Superseded]:
        if self.classifier is None:
            return super().superseded()
        message = f"--classifier {self.classifier} is trained already: leave out {{given}}"
        names = ("model", "width", "depth", "activation", "standard_epochs")
        return [*super().superseded(), Superseded(names, message)]

    def run(self) -> None:
        from .._process import processes
        from ..methods.arrest import ArrestTask

        if self.keep_teacher and (self.loop.padding or self.loop.flip):
            raise ValueError("--keep-teacher is for images that are not augmented: leave out --padding and --flip")
        images = self.load_data()
        task = ArrestTask(self.start(images), self.method, images.image_shape, self.layers or None)
        if self.keep_teacher and task.teacher is not None:
            task.teacher.keep(images.x_train, progress=processes()[0] == 0)
        train(self, task, images, self.loop, out=self.out, title="arrest")
        if processes()[0] == 0:
            finish_classifier(task.result, images, self.out, self.method.attack.eps, "arrest")
            print(self.attacked_by(self.out, self.method.attack.eps, self.method.attack.norm))

    def start(self, images: DataSet) -> nn.Module:
        """The standardly trained classifier."""
        import torch

        from .._process import processes
        from ..training import ClassifierTask, fit, save_classifier

        if self.classifier is not None:
            return self.fitting(trained_classifier(self.classifier, self.classifier_weights, images), images)
        self.refuse_another_run()
        torch.manual_seed(self.loop.seed)
        model, folder = self.fitting(self.fresh(images), images), self.out / "standard"
        task, loop = ClassifierTask(model, ClassifierConfig()), replace(self.loop, epochs=self.standard_epochs)
        fit(task, images.x_train, images.y_train, loop, folder=folder, title="standard")
        if processes()[0] == 0:
            save_classifier(model, folder)
        return model

    def fitting(self, model: nn.Module, images: DataSet) -> nn.Module:
        """The classifier, if it fits the images and has the layers; refused before anything is trained, if not."""
        from ..methods.arrest import Teacher
        from ..models.classifiers import representation_before_pooling

        layers = self.layers or (representation_before_pooling(model),)
        classes = Teacher(model, layers, images.image_shape, self.method.pooled).reader.num_classes
        if images.num_classes > classes:
            raise ValueError(f"--data {self.data}: it has {images.num_classes} classes, the classifier {classes}")
        return model

    def refuse_another_run(self) -> None:
        """ValueError if OUT holds another run, before the standard classifier is trained into it for minutes."""
        from ..training.checkpoint import last_checkpoint
        from ..training.config import settings
        from ..training.run import loop_facts, refuse_another

        checkpoint, attack = last_checkpoint(self.out), self.method.attack
        if checkpoint is None:
            return
        wanted = {"task": "arrest", **settings(self.method), **loop_facts(self.loop)}
        wanted["alpha"] = attack.step_size(attack.eps)
        refuse_another(self.out, {name: checkpoint["facts"].get(name) for name in wanted}, wanted)
