"""The description of a method, and the base classes of trainings. A training is a command, and its fields are options.

The description of a field is the text of ``--help``. This module does not import PyTorch, so help does not wait for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .._validation import Share
from ..training import FitConfig

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    from ..data import DataSet
    from ..training import Task
    from .recipes import Recipe


@dataclass(frozen=True)
class Training(ABC):
    """A training and its options.

    Args:
        out: Folder of the run, for the checkpoint, the log, the options and the trained model.
    """

    #: The name of the command, such as ``train carso``.
    called: ClassVar[str]
    #: The options that have no effect "without" or "beside" another option. The tables of base classes hold too.
    no_effect: ClassVar[dict[tuple[str, str], tuple[str, ...]]] = {}
    #: What the number is that the command prints at the end, and the largest number of held-out images that it is of.
    measured: ClassVar[tuple[str, int]] = ("accuracy without an attack", 10**9)

    out: Path = Path("runs")
    method: Any = None
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=1))

    @abstractmethod
    def task(self, images: DataSet, classifier: Any) -> Task:
        """Make the model with its initial weights, and the task that trains it.

        Args:
            images: the data set, on the device of the training.
            classifier: the trained classifier for an `OnClassifier`; None for any other training.
        """

    def save(self, trained: Any, images: DataSet) -> None:
        """Save the trained classifier."""
        from ..training import save_classifier

        save_classifier(trained, self.out, images.classes)


@dataclass(frozen=True)
class FollowsRecipe(Training):
    """A training whose settings can be those of a recipe, which is a published training.

    Args:
        recipe: Name of a published training of this method (see `purify-fast recipe`), whose settings become the
            defaults of this command.
        official_code: With --recipe: repeat also the known mistakes of the authors' code (`purify-fast recipe NAME`).
    """

    no_effect: ClassVar = {("without", "recipe"): ("official_code",)}

    recipe: str | None = None
    official_code: bool = False

    @classmethod
    def of_recipe(cls, name: str | None, official_code: bool, batch_size: int | None = None) -> Self:
        """Make this command with the settings of a recipe of its method; None for those of the command."""
        if name is None:
            return cls()
        from .recipes import recipe

        published = recipe(name, cls.called.split()[-1])
        if batch_size is not None:
            published = published.for_batch(batch_size)
        options = {"method": published.config(official_code), "loop": published.loop(official_code)}
        options |= {"recipe": published.name, "official_code": official_code, "data": published["data.name"]}
        return cls(**options, **cls.sizes_of(published, official_code))

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        """The options of this command that a recipe sets, in addition to the fields `method` and `loop`."""
        return {}


@dataclass(frozen=True)
class OnClassifier(Training):
    """A training that starts from a trained classifier.

    Args:
        classifier: The classifier: a folder that `train classifier` or `train arrest` wrote, or zoo:NAME, or a name
            such as torchvision:resnet18, timm:resnet18 or package.module:function (your function).
        classifier_weights: Weights of a classifier that is given by name: a .safetensors or .pth file, from which only
            tensors are read (its moving average, if there is one).
        mean: With --classifier-weights: mean by which the images in [0, 1] were normalized in their training; a number,
            or one for each channel, such as 0.485 0.456 0.406. Default: 0.
        std: With --mean: standard deviation by which the images were then divided. Default: 1.
    """

    no_effect: ClassVar = {("without", "classifier_weights"): ("mean", "std")}

    classifier: str = "runs/classifier"
    classifier_weights: str | None = None
    mean: tuple[Share, ...] = ()
    std: tuple[Share, ...] = ()


@dataclass(frozen=True)
class TrainPurifier(OnClassifier):
    """A training of a purifier for a classifier that is already trained."""

    measured: ClassVar[tuple[str, int]] = ("accuracy of the defence without an attack", 512)

    def save(self, trained: Any, images: DataSet) -> None:
        """Save the defence, with its classifier in the folder ``classifier``."""
        from ..training import save_classifier

        trained.save(self.out)
        save_classifier(trained.classifier, self.out / "classifier", images.classes)


def saved_start(kind: type, folder: Path, classifier: nn.Module, **options: Any) -> Any:
    """Load a defence of a class, from which a training starts, with the options of `load_defence`."""
    from .loading import load_defence

    defence = load_defence(folder, classifier, **options)
    if not isinstance(defence, kind):
        raise ValueError(f"{folder} must contain a saved {kind.__name__}, but it contains a {type(defence).__name__}")
    return defence


@dataclass(frozen=True)
class Method:
    """The description of a method. It does not import PyTorch, so ``--help`` does not wait for it.

    Args:
        trainings: the trainings, each of which is a command ``train NAME``.
        trained_by: for a method without a training: what trains its networks, and how the result is used.
        defence: the public name of the defence in the method's package. None: the method trains classifiers.
        parts: the kinds of files that hold only a part of the defence and no classifier. Each has the prefix of the
            names of the part's tensors in the defence.
        loading: a dataclass whose fields are options of the commands that load a saved defence of this method, such as
            ``evaluate``. Its method ``changes`` returns the arguments of `load_defence` that these options set; empty
            if no option is given.
        recipes: whether the method's package has published systems, as the mapping ``RECIPES``.
    """

    trainings: Sequence[type[Training]] = ()
    trained_by: str = ""
    defence: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    loading: type | None = None
    recipes: bool = False
