"""What the commands that train have in common."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..training import FitConfig
from .classifiers import is_named, named_classifier, saved_folder, trained_classifier
from .command import DataCommand
from .run_file import ball_of_run, write_run_file

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    from ..data import DataSet
    from ..defences.base import Defence
    from ..methods.base import PurifierTask, Recipe
    from ..training import Task, TrainingAttack


@dataclass(frozen=True)
class Training(DataCommand):
    """A command that trains.

    Args:
        out: The folder of the run, with its checkpoint, log, options and what was trained.
    """

    out: Path = Path("runs")
    method: Any = None
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=1))

    @abstractmethod
    def task(self, images: DataSet) -> Task:
        """What is trained, with the weights that it starts from."""

    @abstractmethod
    def save(self, trained: Any, images: DataSet) -> None:
        """Save what the training results in."""

    def run(self) -> None:
        from .._process import processes
        from ..training import Callback, TrainingState, fit, summary

        @cache
        def write_once() -> None:
            write_run_file(self, self.out)

        class Begun(Callback):
            """Writes the options as soon as the training has begun, and not before what would refuse it."""

            def on_step(self, state: TrainingState) -> None:
                write_once()

            # a run that was finished before has no step
            on_end = on_step

        images, title = self.load_data(), self.called.split()[-1]
        task = self.task(images)
        last = fit(task, images.x_train, images.y_train, self.loop, folder=self.out, title=title, callbacks=[Begun()])
        if processes()[0] == 0:
            print(summary(last))
            self.save(task.result, images)
            attack = self.method.attack
            print(self.attacked_by(self.out, attack.eps, attack.norm) if attack.eps > 0 else f"saved to {self.out}")


@dataclass(frozen=True)
class FreshClassifier(DataCommand):
    """A command that makes a classifier with fresh weights.

    Args:
        model: The classifier's network: small_cnn, preact_resnet18, wide_resnet, fully_connected, torchvision:NAME,
            timm:NAME or package.module:function.
        width: Channels of the network's first stage (small_cnn 16, preact_resnet18 64), or wide_resnet's factor (10).
        depth: Layers of a wide_resnet (28).
        activation: Activation of a wide_resnet (silu).
    """

    model: str = "small_cnn"
    width: int | None = None
    depth: int | None = None
    activation: Literal["silu", "relu"] | None = None

    def fresh(self, images: DataSet) -> nn.Module:
        """The classifier, on the images' device; ValueError for one, or for a size of it, that there is not."""
        from ..data import statistics
        from ..models.classifiers import build_classifier

        sizes: dict[str, Any] = {name: getattr(self, name) for name in ("width", "depth", "activation")}
        if is_named(self.model):
            for name, value in sizes.items():
                if value is not None:
                    raise ValueError(f"--{name} {value}: the size of {self.model} is in its name")
            return named_classifier(self.model, None, images)
        mean, std = statistics(images.x_train)
        model = build_classifier(self.model, images.image_shape, images.num_classes, mean=mean, std=std, **sizes)
        return model.to(images.y_train.device)


@dataclass(frozen=True)
class FollowsRecipe(Training):
    """A command that trains by a published training, if one is named.

    Args:
        recipe: A published training of this method, such as `purify-fast recipe` lists; its numbers become this
            command's defaults.
        official_code: With --recipe: as its code runs it, where that differs from what it surely means; `purify-fast
            recipe NAME` says where.
    """

    #: the method's name
    of: ClassVar[str]

    recipe: str | None = None
    official_code: bool = False

    @classmethod
    def of_recipe(cls, name: str, official_code: bool) -> Self:
        """This command with the numbers of a recipe, by its name with or without the method."""
        from ..methods.recipes import recipe

        published = recipe(name, cls.of)
        options = {"method": published.config(official_code), "loop": published.loop(official_code)}
        options |= {"recipe": published.name, "official_code": official_code, "data": published["data.name"]}
        return cls(**options, **cls.sizes_of(published, official_code))

    @staticmethod
    @abstractmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        """The method's own options that a recipe sets."""

    def published(self) -> Any:
        """The recipe that is followed; None for none."""
        from ..methods.recipes import recipe

        return None if self.recipe is None else recipe(self.recipe, self.of)

    def superseded(self) -> dict[tuple[str, ...], str]:
        return {("official_code",): "--official-code is of a --recipe: name one"} if self.recipe is None else {}

    def load_data(self) -> DataSet:
        images, recipe = super().load_data(), self.published()
        if recipe is not None and images.image_shape != recipe.image_shape:
            shape = recipe.image_shape
            raise ValueError(
                f"--recipe {recipe.name} is for images of shape {shape}; --data {self.data} has {images.image_shape}. "
                f"Images of {shape[0]} channels fit with --size {shape[1]} {shape[2]}; for others leave out --recipe"
            )
        return images


@dataclass(frozen=True)
class OnClassifier(Training):
    """A command that trains on a classifier.

    Args:
        classifier: A folder that `train classifier` or `train arrest` wrote, or zoo:NAME; or a classifier by name:
            torchvision:resnet18, timm:resnet18, or package.module:function of yours.
        classifier_weights: Weights of a classifier by name: a .safetensors or .pth file, of which only tensors are
            read; or what the library calls weights that it has downloaded before, such as IMAGENET1K_V1, or pretrained
            of timm.
    """

    classifier: str | None = None
    classifier_weights: str | None = None


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
                f"--data {self.data}: its images are {images.image_shape}, the purifier's {task.defence.image_shape}"
            )
        return task

    def save(self, trained: Any, images: DataSet) -> None:
        from ..training import save_classifier

        trained.save(self.out)
        save_classifier(trained.classifier, self.out / "classifier")


def saved_start(folder: Path, kind: type[Defence], classifier: nn.Module, check: bool = True) -> Any:
    """The defence of a kind in a folder, to start from; ValueError if there is something else."""
    from ..methods.loading import load_defence

    defence = load_defence(folder, classifier, check=check)
    if not isinstance(defence, kind):
        raise ValueError(f"{folder} holds a defence of the kind {type(defence).__name__}, not {kind.__name__}")
    return defence


def say_other_ball(classifier: str, attack: TrainingAttack) -> None:
    """Tell that a defence is trained at another radius or norm than its classifier was.

    Nothing is told of a classifier by name, of one that was trained on clean images, or where no file says it.
    """
    if is_named(classifier):
        return
    try:
        ball = ball_of_run(saved_folder(classifier))
    except ValueError:
        # damaged options of the classifier's run keep nobody from training on it
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
