"""The options that say which images a command works on, and where."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .command import Command
from .device import usable_device

if TYPE_CHECKING:
    from ..data import DataSet


def _path_or_none(text: str | None) -> Path | None:
    return Path(text) if text else None


@dataclass(frozen=True)
class DataCommand(Command):
    """A command that reads images."""

    data: str = "digits"
    """digits, mnist, fashion_mnist, cifar10, cifar100, svhn, imagenette, tiny_imagenet, an .npz file with
    x_train y_train x_test y_test, or a folder with train/<class>/*.jpg|png and val/ or test/."""
    data_root: Path | None = field(default_factory=lambda: _path_or_none(os.environ.get("PURIFY_FAST_DATA")))
    """Where data sets are looked for and downloaded to; default: PURIFY_FAST_DATA, else the current folder."""
    download: bool = False
    """Let torchvision download the official files if they are missing."""
    size: tuple[int, ...] | None = None
    """Height and width that images are resized and cropped to, before anything attacks them; one number for both."""
    num_classes: int | None = None
    """Number of classes, for a data set whose images lack some of them; default: as many as the labels say."""
    stream: bool = False
    """Read an image folder batch by batch from its decoded copy even if it fits into memory, as for a smaller GPU."""
    cache: Path | None = None
    """Where an image folder's decoded images are kept; default: .purify_fast in that folder."""
    on_bad_image: Literal["refuse", "skip"] = "refuse"
    """What happens to an image folder's images that cannot be decoded: refuse names them, skip leaves them out."""
    follow_links: bool = False
    """Let an image folder's symbolic links lead out of it."""
    device: str = "auto"
    """Where to compute: cpu, cuda, or another of PyTorch's devices; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and (len(self.size) not in (1, 2) or min(self.size) < 1):
            raise ValueError(f"--size must be one or two numbers of at least 1, got {' '.join(map(str, self.size))}")

    def load_data(self) -> DataSet:
        """The images, on the device."""
        from ..data import load_dataset

        device = usable_device(self.device)
        passed_on = ("download", "stream", "cache", "on_bad_image", "follow_links")
        options: dict[str, Any] = {name: getattr(self, name) for name in passed_on}
        size = None if self.size is None else (self.size[0], self.size[-1])
        return load_dataset(self.data, self.data_root, self.num_classes, image_size=size, **options).to(device)

    def attacked_by(self, folder: Path, eps: float, norm: str) -> str:
        """The sentence that names the command that attacks what was trained here: the same images, the same ball."""
        words = ["purify-fast", "evaluate", str(folder), "--data", self.data]
        if self.data_root is not None:
            words += ["--data-root", str(self.data_root)]
        if self.size is not None:
            words += ["--size", *map(str, self.size)]
        if self.num_classes is not None:
            words += ["--num-classes", str(self.num_classes)]
        words += ["--eps", f"{eps:.6g}"] + (["--norm", norm] if norm != "linf" else [])
        return f"saved to {folder}; attack it with: {shlex.join(words)}"
