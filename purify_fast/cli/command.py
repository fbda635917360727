"""Base classes of the commands. A command's fields are its options."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .._places import usable_device
from .._validation import check_types

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..data import DataSet


@dataclass(frozen=True)
class Command(ABC):
    """A command, whose fields are its options.

    Args:
        config: The run.yaml of an earlier run, which sets this command's defaults. Options win over the file.
    """

    #: The name of the command, such as ``train carso``.
    called: ClassVar[str]
    #: All commands by their names.
    kinds: ClassVar[dict[str, type[Command]]] = {}
    #: The options that have no effect "without" or "beside" another option. The tables of base classes hold too.
    no_effect: ClassVar[dict[tuple[str, str], tuple[str, ...]]] = {}
    #: The words that the user has typed after the program's name.
    typed: ClassVar[tuple[str, ...]] = ()

    config: Path | None = None

    def __init_subclass__(cls) -> None:
        if "called" in vars(cls):
            Command.kinds[cls.called] = cls

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def of_recipe(cls, name: str, official_code: bool, batch_size: int | None = None) -> Self:
        """Make this command with the settings of a recipe, if the command has the option --recipe."""
        return cls()

    @abstractmethod
    def run(self) -> int | None:
        """Run the command, and return the exit status; None means 0."""

    def writes(self) -> Path | None:
        """The folder that the command writes to and that is locked during the run; None if there is none."""
        return getattr(self, "out", None)


@dataclass(frozen=True)
class DataCommand(Command):
    """A command that reads images.

    Args:
        data: Data set: digits, mnist, fashion_mnist, cifar10, cifar100, svhn, tiny_imagenet; or an .npz file with
            x_train, y_train, x_test and y_test; or a folder with train/<class>/*.jpg|png, and test/ or val/ (test/ if
            there are both).
        data_root: Folder of the data sets, also for downloads. Default: the variable PURIFY_FAST_DATA, or the current
            folder.
        download: Let torchvision download the official files of a data set if they are missing.
        size: Height and width to which images are resized and cropped before any attack. A single number sets both.
        num_classes: Number of classes, if some labels do not occur in the data. Default: the largest label plus 1.
        stream: Keep the training images in main memory, or in their file, to save memory of the GPU.
        cache: Folder for the decoded images of an image folder. Default: .purify_fast in the image folder.
        device: Device to compute on: cpu, cuda, or another device of PyTorch. auto: a GPU if there is any.
    """

    data: str = "digits"
    data_root: Path | None = field(
        default_factory=lambda: Path(root).expanduser() if (root := os.environ.get("PURIFY_FAST_DATA")) else None
    )
    download: bool = False
    size: tuple[int, ...] | None = None
    num_classes: int | None = None
    stream: bool = False
    cache: Path | None = None
    device: str = "auto"

    def load_data(self, train: bool = True) -> DataSet:
        """Load the images to the device, without training images unless ``train`` is True."""
        from ..data import load_dataset

        device = usable_device(self.device)
        size: Any = self.size * 2 if self.size is not None and len(self.size) == 1 else self.size
        options: dict[str, Any] = {"image_size": size, "train": train, "download": self.download, "cache": self.cache}
        loaded = load_dataset(self.data, self.data_root, self.num_classes, **options)
        moved = loaded.to(device)
        return replace(moved, x_train=loaded.x_train) if self.stream else moved
