"""What the commands that train have in common."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .classifiers import is_named, saved_folder
from .config_file import RunFile, ball_of_run
from .data_args import DataCommand

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..defences.base import Defence
    from ..methods.recipe import Recipe
    from ..training import FitConfig, Task, TrainingAttack


def images_in_turn(command: DataCommand, recipe: Recipe | None = None) -> DataSet:
    """The command's images; of several processes on a machine one reads them first, and may download them.

    Args:
        command: says which images.
        recipe: the published training that the images are for; None for none.

    Raises:
        ValueError: the recipe is for images of another shape.
    """
    # PyTorch takes 1.8 seconds to import: --help does without it
    from ..training.distributed import in_turn

    images = in_turn(command.load_data)
    if recipe is not None and images.image_shape != (shape := recipe["data.image_shape"]):
        size = " ".join(map(str, shape[1:]))
        raise ValueError(
            f"--recipe {recipe.name} is for images of shape {shape}; --data {command.data} has {images.image_shape}. "
            f"Images of {shape[0]} channels fit with --size {size}; for others leave out --recipe"
        )
    return images


def say_other_ball(classifier: str, attack: TrainingAttack) -> None:
    """Tell that a defence is trained at another radius or norm than its classifier was.

    Nothing is told of a classifier by name, of one that was trained on clean images, or where no file says it.

    Args:
        classifier: as ``--classifier`` takes it.
        attack: the attack that the defence is trained on.
    """
    if is_named(classifier):
        return
    try:
        found = ball_of_run(saved_folder(classifier))
    except ValueError:
        # damaged options of the classifier's run keep nobody from training on it
        return
    if found is None or (math.isclose(found[0], attack.eps, rel_tol=1e-4) and found[1] == attack.norm):
        return
    eps, norm = found
    same = f"--eps {eps:.6g}" + (f" --norm {norm}" if norm != attack.norm else "")
    print(
        f"note: {classifier} was trained at {norm} {eps:.6g}, and this trains at {attack.norm} {attack.eps:.6g}; "
        f"{same} gives both the same",
        file=sys.stderr,
    )


def finish_classifier(model: nn.Module, images: DataSet, out: Path, eps: float, name: str) -> None:
    """Save a trained classifier, and print how it does on the held-out images.

    Args:
        model: the classifier.
        images: whose held-out images it is measured on.
        out: where the run is kept.
        eps: the radius that it was trained at, in image units.
        name: what it is called in the table.
    """
    # PyTorch takes 1.8 seconds to import: --help does without it
    from ..evaluation import evaluate
    from ..training import save_classifier

    save_classifier(model, out)
    print(evaluate(model, images.x_test[:], images.y_test, eps=eps, attacks=[], name=name).to_text())


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
