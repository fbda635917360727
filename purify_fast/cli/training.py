"""What the commands that train have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .config_file import RunFile
from .data_args import DataCommand

if TYPE_CHECKING:
    from ..data import DataSet
    from ..defences.base import Defence
    from ..training import FitConfig, Task


def images_in_turn(command: DataCommand) -> DataSet:
    """The command's images; of several processes on a machine one reads them first, and may download them."""
    # PyTorch takes 1.8 seconds to import: --help does without it
    from ..training.distributed import in_turn

    return in_turn(command.load_data)


def train_defence(
    command: DataCommand, images: DataSet, task: Task, defence: Defence, loop: FitConfig, out: Path, title: str
) -> bool:
    """Train a defence, and save it with its classifier beside it.

    Args:
        command: says what the images are called.
        images: what to train on.
        task: the training.
        defence: what it trains.
        loop: how long.
        out: where the run is kept.
        title: of the progress bar.

    Returns:
        Whether this process is the one that saves and prints.

    Raises:
        ValueError: the images or labels are not those the defence takes.
    """
    # PyTorch takes 1.8 seconds to import: --help does without it
    from .._process import processes
    from ..methods.saved_defence import save_defence
    from ..training import fit, save_classifier, summary

    if images.image_shape != defence.image_shape:
        raise ValueError(
            f"--data {command.data}: its images are {images.image_shape}, the purifier's {defence.image_shape}"
        )
    if images.num_classes > defence.num_classes:
        raise ValueError(
            f"--data {command.data}: it has {images.num_classes} classes, the classifier {defence.num_classes}"
        )
    last = fit(task, images.x_train, images.y_train, loop, folder=out, title=title, callbacks=[RunFile(command, out)])
    if processes()[0] > 0:
        return False
    print(summary(last))
    save_defence(defence, out)
    save_classifier(defence.classifier, out / "classifier")
    return True
