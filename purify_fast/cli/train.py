"""The commands that train a classifier or the network of a method."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..methods import all_methods
from ..methods.trainings import OnClassifier, Training
from ..training import ClassifierConfig, FitConfig
from .command import DataCommand, parse, values, words_of, write_run_file
from .evaluate import accuracy_text, ball_of, is_named, named_classifier, trained_classifier

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..training import Task


@dataclass(frozen=True)
class TrainCommand(Training, DataCommand):
    """A command that trains a model."""

    def run(self) -> None:
        images = self.load_data()
        self.with_batches_of(len(images.x_train)).train(images)

    def with_batches_of(self, images: int) -> TrainCommand:
        """Return this command with batches of at most a sixth of the images, if no size was given."""
        from .._process import processes

        rank, world = processes()
        most = max(1, images // 6 // world) * world
        if not self.typed or self.loop.batch_size <= most:
            return self
        sized = replace(parse(type(self), list(self.typed[len(self.called.split()) :]), most), device=self.device)
        if rank == 0 and sized.loop.batch_size == most:
            print(f"--batch-size {most}, by default at most a sixth of the {images} training images")
        return sized

    def begin(self, begin: Callable[[], None]) -> None:
        """Write run.yaml when `fit` has accepted the settings, so that what is interrupted later can be resumed."""
        begin()
        write_run_file(self, self.out)

    def train(self, images: DataSet) -> None:
        """Train on images, save the result, and print its accuracy."""
        import torch

        from .._process import processes
        from ..training import fit, summary

        title, first = self.called.split()[-1], processes()[0] == 0
        classifier = given_classifier(self, images, first) if isinstance(self, OnClassifier) else None
        torch.manual_seed(self.loop.seed)
        task = self.task(images, classifier)
        if first:
            vars(task)["begin"] = partial(self.begin, task.begin)
        last = fit(task, images.x_train, images.y_train, self.loop, folder=self.out, title=title)
        if not first:
            return
        self.save(task.result, images)
        write_run_file(self, self.out)
        print(summary(last))
        what, most = self.measured
        share = accuracy_text(task.result, images.x_test, images.y_test, self.loop.batch_size, most)
        print(f"{what}: {share}")
        options = values(self)
        same = {name: options[name] for name in ("data", "size", "num_classes", "data_root") if options[name]}
        words = words_of(same, type(self))
        attack = shlex.join(["purify-fast", "evaluate", str(self.out), *words])
        print(f"saved to {self.out}" + (f"; attack it with: {attack}" if options.get("eps", 0) > 0 else ""))


def given_classifier(options: OnClassifier, images: DataSet, prints: bool) -> nn.Module:
    """Load the classifier, and print how it normalizes images, and its accuracy on at most 1,000 images."""
    model = trained_classifier(options.classifier, options.classifier_weights, images, options.mean, options.std)
    if prints:
        facts: dict[str, Any] = model.arguments  # type: ignore[assignment]
        mean, std = (" ".join(f"{value:.4g}" for value in facts.get(name, ())) for name in ("mean", "std"))
        how = f"mean {mean}, std {std}" if mean else "by its own code"
        share = accuracy_text(model, images.x_test, images.y_test, options.loop.batch_size, 1000)
        name = " with ".join(filter(None, (options.classifier, options.classifier_weights)))
        print(f"classifier {name}: normalization of images in [0, 1]: {how}")
        print(f"its accuracy without an attack: {share}", flush=True)
        attack, ball = options.method.attack, ball_of(options.classifier)
        # The training of a generator attacks no images.
        clean = getattr(options.method, "attack_method", "pgd") == "none"
        if not clean and ball not in (None, (attack.eps, attack.norm)):
            own = "its own radius is {1} {0:.4g}".format(*ball)
            print(f"{own}, and this training attacks within {attack.norm} {attack.eps:.4g} (--norm, --eps)", flush=True)
    return model


@dataclass(frozen=True)
class TrainClassifier(TrainCommand):
    """Train a classifier: on clean images (eps 0), or adversarially with PGD.

    An interrupted training continues if the same command is run again.

    Args:
        model: Network of the classifier: small_cnn, preact_resnet18, wide_resnet, torchvision:NAME, timm:NAME or
            package.module:function.
        width: Number of channels of the network's first stage. Default: 16 for small_cnn, 64 for preact_resnet18. For
            wide_resnet it is the factor of all widths, by default 10.
        depth: Number of layers of a wide_resnet. Default: 28.
        activation: Activation of a wide_resnet. Default: silu.
    """

    called: ClassVar[str] = "train classifier"
    example: ClassVar[str] = "--data pets --size 64 --model preact_resnet18 --width 16 --eps 8/255 --out runs/pets"

    out: Path = Path("runs/classifier")
    model: str = "small_cnn"
    width: int | None = None
    depth: int | None = None
    activation: Literal["silu", "relu"] | None = None
    method: ClassifierConfig = field(default_factory=ClassifierConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=30))

    def task(self, images: DataSet, classifier: Any) -> Task:
        from ..data import statistics
        from ..models.classifiers import CLASSIFIERS, build_classifier
        from ..training import ClassifierTask

        sizes: dict[str, Any] = {"width": self.width, "depth": self.depth, "activation": self.activation}
        if is_named(self.model):
            if any(sizes.values()):
                raise ValueError(f"--width, --depth and --activation are not for --model {self.model}")
            model = named_classifier(self.model, None, images)
        elif self.model in CLASSIFIERS:
            mean, std = statistics(images.x_train)
            model = build_classifier(self.model, images.image_shape, images.num_classes, mean=mean, std=std, **sizes)
        else:
            others = "torchvision:NAME such as torchvision:resnet18, timm:NAME or package.module:function"
            raise ValueError(f"--model must be {', '.join(CLASSIFIERS)}, {others}, got {self.model!r}")
        return ClassifierTask(model.to(images.y_train.device), self.method)


def _command(training: type[Training]) -> type[TrainCommand]:
    """Make the command of a method's training."""
    own = {"called": training.called, "__doc__": training.__doc__, "__module__": training.__module__}
    example = "--eps 0.2 --epochs 20"
    own["example"] = f"--classifier {training.classifier} {example}" if issubclass(training, OnClassifier) else example
    return dataclass(frozen=True)(type(training.__name__, (training, TrainCommand), own))


#: The commands of all trainings of methods, by their names.
TRAININGS = {training.called: _command(training) for method in all_methods().values() for training in method.trainings}
#: What trains the networks of a method without a training here, by the name that its command would have.
ELSEWHERE = {f"train {name}": method.trained_by for name, method in all_methods().items() if method.trained_by}
