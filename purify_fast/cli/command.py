"""The parts that the commands share: options as the fields of a dataclass, the images, and the device."""

from __future__ import annotations

import os
import shlex
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .._validation import check_types

if TYPE_CHECKING:
    from ..data import DataSet


@dataclass(frozen=True)
class Command(ABC):
    """A command: its fields are its options.

    Args:
        config: The run.yaml of an earlier run. It gives this command's defaults; options on the command line win over
            them.
    """

    #: how it is called, as in ``train carso``
    called: ClassVar[str]
    #: the words behind the program's name, of a command that was typed
    typed: ClassVar[tuple[str, ...]] = ()

    config: Path | None = None

    def __post_init__(self) -> None:
        check_types(self)

    @abstractmethod
    def run(self) -> int | None:
        """Do what the command is for; the exit status, None for 0."""

    def writes(self) -> Path | None:
        """The folder that the command writes, in which no other run may write meanwhile; None if it writes none."""
        return getattr(self, "out", None)

    def ignored_beside(self) -> dict[tuple[str, ...], str]:
        """Options that have no meaning beside others of this command, and the error for whoever gives one of them.

        ``{given}`` in an error stands for the names of those that were given.
        """
        return {}


@dataclass(frozen=True)
class DataCommand(Command):
    """A command that reads images.

    Args:
        data: digits, mnist, fashion_mnist, cifar10, cifar100, svhn, imagenette, tiny_imagenet, an .npz file with
            x_train y_train x_test y_test, or a folder with train/<class>/*.jpg|png and val/ or test/, or with tar
            shards, train/*.tar and val/*.tar.
        data_root: Where data sets are looked for and downloaded to; default: PURIFY_FAST_DATA, else the current folder.
        download: Let torchvision download the official files if they are missing.
        size: Height and width that images are resized and cropped to, before anything attacks them; one number for
            both.
        num_classes: Number of classes, for a data set whose images lack some of them; default: as many as the labels
            say.
        stream: Read an image folder batch by batch from its decoded copy even if it fits into memory, as for a smaller
            GPU.
        decode: When an image folder's images are decoded: once, into a copy on the disk, or each_time that they are
            read.
        cache: Where an image folder's decoded images are kept; default: .purify_fast in that folder.
        on_bad_image: What happens to an image folder's images that cannot be decoded: refuse names them, skip leaves
            them out.
        follow_links: Let an image folder's symbolic links lead out of it.
        device: Where to compute: cpu, cuda, or another of PyTorch's devices; auto takes a GPU if there is one.
    """

    data: str = "digits"
    data_root: Path | None = field(
        default_factory=lambda: Path(root) if (root := os.environ.get("PURIFY_FAST_DATA")) else None
    )
    download: bool = False
    size: tuple[int, ...] | None = None
    num_classes: int | None = None
    stream: bool = False
    decode: Literal["once", "each_time"] = "once"
    cache: Path | None = None
    on_bad_image: Literal["refuse", "skip"] = "refuse"
    follow_links: bool = False
    device: str = "auto"

    def load_data(self) -> DataSet:
        """The images, on the device."""
        from ..data import load_dataset

        device = usable_device(self.device)
        names = ("download", "stream", "decode", "cache", "on_bad_image", "follow_links")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        size: Any = self.size * 2 if self.size is not None and len(self.size) == 1 else self.size
        return load_dataset(self.data, self.data_root, self.num_classes, image_size=size, **options).to(device)

    def attacked_by(self, folder: Path) -> str:
        """The sentence that names the command that attacks what was trained here, on the same images.

        The folder says in which ball.
        """
        words = ["purify-fast", "evaluate", str(folder), "--data", self.data]
        for name in ("data_root", "size", "num_classes"):
            value = getattr(self, name)
            if value is not None:
                words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
        return f"saved to {folder}; attack it with: {shlex.join(words)}"


def usable_device(name: str) -> str:
    """The device that an option names: "auto" becomes "cuda" or "cpu", other names stay.

    Raises:
        ValueError: no such device, or none on this machine.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        # PyTorch answers a name that it does not know with all that it knows
        why = "PyTorch has no such device" if why.startswith("Expected one of") else why
        raise ValueError(f"--device {name} cannot be used here: give auto, cpu, cuda or cuda:N ({why})") from error
    return name
