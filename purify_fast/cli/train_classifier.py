"""The commands that train classifiers: ``purify-fast train classifier`` and ``purify-fast train arrest``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..methods.arrest import ArrestConfig
from ..training import ClassifierConfig, FitConfig
from .saved_models import accuracy_text, is_named, named_classifier
from .training import FollowsRecipe, OnClassifier, Training

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..methods.publication import Recipe
    from ..training import Task

#: The options of a network's size.
SIZES = ("width", "depth", "activation")


@dataclass(frozen=True)
class FreshClassifier(Training):
    """A command that makes a classifier with random weights, and trains it.

    Args:
        model: Network of the classifier: small_cnn, preact_resnet18, wide_resnet, fully_connected, torchvision:NAME,
            timm:NAME or package.module:function.
        width: Number of channels of the network's first stage. Default: 16 for small_cnn, 64 for preact_resnet18. For
            wide_resnet it is the factor of all widths, by default 10.
        depth: Number of layers of a wide_resnet. Default: 28.
        activation: Activation of a wide_resnet. Default: silu.
    """

    model: str = "small_cnn"
    width: int | None = None
    depth: int | None = None
    activation: Literal["silu", "relu"] | None = None

    def fresh(self, images: DataSet) -> nn.Module:
        """Make the classifier on the device of the images."""
        from ..data import statistics
        from ..models.classifiers import build_classifier

        sizes: dict[str, Any] = {name: getattr(self, name) for name in SIZES}
        if is_named(self.model):
            if any(sizes.values()):
                raise ValueError(f"--width, --depth and --activation are not for --model {self.model}")
            return named_classifier(self.model, None, images)
        mean, std = statistics(images.x_train)
        model = build_classifier(self.model, images.image_shape, images.num_classes, mean=mean, std=std, **sizes)
        return model.to(images.y_train.device)

    def save(self, trained: Any, images: DataSet) -> None:
        """Save the classifier, and print its accuracy on the held-out images, which are not attacked."""
        from ..training import save_classifier

        save_classifier(trained, self.out, images.classes)
        print("accuracy without an attack:", accuracy_text(trained, images.x_test, images.y_test, self.loop.batch_size))


@dataclass(frozen=True)
class TrainClassifier(FreshClassifier):
    """Train a classifier: on clean images (eps 0), or adversarially with PGD.

    An interrupted training continues if the same command is run again.
    """

    called: ClassVar[str] = "train classifier"

    out: Path = Path("runs/classifier")
    method: ClassifierConfig = field(default_factory=ClassifierConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=30))

    def task(self, images: DataSet) -> Task:
        import torch

        from ..training import ClassifierTask

        torch.manual_seed(self.loop.seed)
        return ClassifierTask(self.fresh(images), self.method)


@dataclass(frozen=True)
class TrainArrest(FollowsRecipe, OnClassifier, FreshClassifier):
    """Finetune a standard classifier adversarially by ARREST, so that its representation changes little.

    Without --classifier, a standard classifier is trained first, and saved to OUT/standard. The result is a classifier,
    which `evaluate` can attack, and which `train carso` and `train atop` can use. An interrupted training continues if
    the same command is run again.

    Args:
        standard_epochs: Number of epochs for the standard classifier. A re-implementation of the paper has 100.
        layers: Names of the layers whose outputs are the representation. Default: the last map before pooling.
        keep_teacher: Compute the standard classifier's representation of each image only once, and keep it in memory.
            This is not possible with augmentation.
    """

    called: ClassVar[str] = "train arrest"
    of: ClassVar[str] = "arrest"
    set_by: ClassVar = {"classifier": ("model", *SIZES, "standard_epochs")}

    out: Path = Path("runs/arrest")
    standard_epochs: int = 100
    layers: tuple[str, ...] = ()
    keep_teacher: bool = False
    method: ArrestConfig = field(default_factory=ArrestConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=20))

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        network = recipe.part("classifier")
        return {"model": network.pop("name"), **network}

    def starts(self) -> dict[str, str]:
        if self.classifier is not None:
            return super().starts()
        return {"start.classifier": f"trained on clean images for {self.standard_epochs} epochs"}

    def task(self, images: DataSet) -> Task:
        from .._process import processes
        from ..methods.arrest import ArrestTask

        task = ArrestTask(self.start(images), self.method, images.image_shape, self.layers or None)
        if self.keep_teacher and task.teacher is not None:
            task.teacher.keep(images.x_train, progress=processes()[0] == 0)
        return task

    def start(self, images: DataSet) -> nn.Module:
        """Load or train the standard classifier."""
        import torch

        from .._process import processes
        from ..methods.arrest import Teacher
        from ..models.representation import representation_before_pooling
        from ..training import ClassifierTask, fit, save_classifier

        if self.classifier is not None:
            return self.given_classifier(images)
        torch.manual_seed(self.loop.seed)
        model, folder = self.fresh(images), self.out / "standard"
        # This raises an error for wrong layers before anything is trained.
        Teacher(model, self.layers or (representation_before_pooling(model),), images.image_shape, self.method.pooled)
        task, loop = ClassifierTask(model, ClassifierConfig()), replace(self.loop, epochs=self.standard_epochs)
        fit(task, images.x_train, images.y_train, loop, folder=folder, title="standard")
        if processes()[0] == 0:
            save_classifier(model, folder, images.classes)
        return model
