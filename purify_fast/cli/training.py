"""Base classes of the commands that train."""

from __future__ import annotations

import shlex
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .._validation import Share
from ..training import FitConfig
from .command import DataCommand
from .run_file import values, write_run_file
from .saved_models import accuracy_text, trained_classifier

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    from ..data import DataSet
    from ..methods.publication import Recipe
    from ..training import BankConfig, Task


@dataclass(frozen=True)
class Training(DataCommand):
    """A command that trains a model.

    Args:
        out: Folder of the run, for the checkpoint, the log, the options and the trained model.
    """

    out: Path = Path("runs")
    method: Any = None
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=1))

    @abstractmethod
    def task(self, images: DataSet) -> Task:
        """Make the task of the training: the model with its initial weights, and its loss."""

    @abstractmethod
    def save(self, trained: Any, images: DataSet) -> None:
        """Save the trained model."""

    def bank_config(self) -> BankConfig | None:
        """The settings of the bank of adversarial images; None for a training without a bank."""
        return None

    def starts(self) -> dict[str, str]:
        """The weights from which the training starts, by the keys of a recipe's facts."""
        return {}

    def before_training(self, task: Any, images: DataSet) -> None:
        """Print what the user should know before the first step."""

    def run(self) -> None:
        from .._process import processes
        from ..training import fit, summary

        images, title = self.load_data(), self.called.split()[-1]
        task = self.task(images)
        if processes()[0] == 0:
            self.before_training(task, images)
        bank = self.bank_config()
        last = fit(task, images.x_train, images.y_train, self.loop, folder=self.out, title=title, bank=bank)
        if processes()[0] == 0:
            print(summary(last))
            self.save(task.result, images)
            write_run_file(self, self.out)
            attack = shlex.join(["purify-fast", "evaluate", str(self.out), "--data", self.data])
            print(f"saved to {self.out}" + (f"; attack it with: {attack}" if values(self).get("eps", 0) > 0 else ""))


@dataclass(frozen=True)
class FollowsRecipe(Training):
    """A command that can train by a recipe, which is the settings of a published training.

    Args:
        recipe: Name of a published training of this method (see `purify-fast recipe`), whose settings become the
            defaults of this command. The command prints in which points the training is not as published.
        official_code: With --recipe: repeat also the known mistakes of the authors' code (`purify-fast recipe NAME`).
    """

    only_with: ClassVar = {"recipe": ("official_code",)}
    #: The name of the method in `purify_fast.methods.method.METHODS`.
    of: ClassVar[str]

    recipe: str | None = None
    official_code: bool = False

    @classmethod
    def of_recipe(cls, name: str, official_code: bool, batch_size: int | None = None) -> Self:
        from ..methods.recipes import recipe

        published = recipe(name, cls.of)
        if batch_size is not None:
            published = published.for_batch(batch_size)
        options = {"method": published.config(official_code), "loop": published.loop(official_code)}
        options |= {"recipe": published.name, "official_code": official_code, "data": published["data.name"]}
        return cls(**options, **cls.sizes_of(published, official_code))

    @staticmethod
    @abstractmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        """The options of this command that a recipe sets, in addition to the fields `method` and `loop`."""

    def saved_start(self, folder: Path, classifier: nn.Module, **options: Any) -> Any:
        """Load a defence of this method, from which the training starts, with the options of `load_defence`."""
        from ..methods.loading import load_defence
        from ..methods.method import METHODS

        defence, kind = load_defence(folder, classifier, **options), METHODS[self.of].defence
        if kind is None or not isinstance(defence, kind):
            raise ValueError(f"{folder} contains no defence of the method {self.of}, but a {type(defence).__name__}")
        return defence

    def adapted(self, images: DataSet) -> Any:
        """The recipe for the images; None if no recipe is named."""
        from ..data import statistics
        from ..methods.recipes import recipe

        if self.recipe is None:
            return None
        published = recipe(self.recipe, self.of)
        same = images.name == published["data.name"] and images.image_shape[0] == published.image_shape[0]
        mean, std = (None, None) if same else statistics(images.x_train)
        return published.for_data(images.image_shape, images.num_classes, name=images.name, mean=mean, std=std)

    def before_training(self, task: Any, images: DataSet) -> None:
        """Print in which points a training by a recipe is not as published."""
        if (recipe := self.adapted(images)) is None:
            return
        bank, given = self.bank_config(), self.starts()
        points = recipe.deviations(task, self.loop, self.official_code, bank=bank, given=given)
        print("\n- ".join([f"{recipe.name} on {images.name}: not as published in {len(points)} points", *points]))
        print("\n- ".join(["Not reproduced in any training by this recipe:", *recipe.not_reproduced]))


@dataclass(frozen=True)
class OnClassifier(Training):
    """A command whose training starts from a trained classifier.

    Args:
        classifier: The classifier: a folder that `train classifier` or `train arrest` wrote, or zoo:NAME, or a name
            such as torchvision:resnet18, timm:resnet18 or package.module:function (your function).
        classifier_weights: Weights of a classifier that is given by name: a .safetensors or .pth file, from which only
            tensors are read (its moving average, if there is one). Or the library's name for weights that it has
            downloaded, such as IMAGENET1K_V1 of torchvision or pretrained of timm.
        mean: With a file of weights: mean by which the images in [0, 1] were normalized in their training; a number, or
            one for each channel, such as 0.485 0.456 0.406. Default: 0. The library's own weights have their own.
        std: With --mean: standard deviation by which the images were then divided. Default: 1.
    """

    only_with: ClassVar = {"classifier_weights": ("mean", "std")}

    classifier: str | None = None
    classifier_weights: str | None = None
    mean: tuple[Share, ...] = ()
    std: tuple[Share, ...] = ()

    def given_classifier(self, images: DataSet) -> nn.Module:
        """Load the classifier, and print how it normalizes images, and its accuracy on at most 1,000 images."""
        from .._process import processes
        from ..data import balanced_subset

        model = trained_classifier(str(self.classifier), self.classifier_weights, images, self.mean, self.std)
        if processes()[0] == 0:
            facts: dict[str, Any] = model.arguments  # type: ignore[assignment]
            mean, std = (" ".join(f"{value:.4g}" for value in facts.get(name, ())) for name in ("mean", "std"))
            how = f"mean {mean}, std {std}" if mean else "by its own code"
            some = balanced_subset(images.x_test, images.y_test, 1000, seed=0, num_classes=images.num_classes)
            share = accuracy_text(model, some.x, some.y, self.loop.batch_size)
            print(f"classifier {self.starts()['start.classifier']}: normalization of images in [0, 1]: {how}")
            print(f"its accuracy without an attack: {share}", flush=True)
        return model

    def starts(self) -> dict[str, str]:
        return {"start.classifier": " with ".join(filter(None, (self.classifier, self.classifier_weights)))}
