"""Measure how many JPEGs a training can read in a second, compared with its steps, and what a broken image does."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from purify_fast.data import batches, load_dataset, read_ahead, resized_crop, to_float
from purify_fast.models.foreign import ForeignClassifier
from purify_fast.training import Batch, ClassifierConfig, ClassifierTask
from purify_fast.training.loop import train_step

from ..kept import Row
from .commands import called

SIDE, BATCH = 224, 8
#: Number of images that a measurement reads, and its seconds.
Measured = tuple[int, float]


def loader(folder: Path, side: int, workers: int = 0) -> DataLoader[Any]:
    """Return a DataLoader of random square crops, in batches of `BATCH`.

    Args:
        folder: folder with an image folder for each class.
        side: height and width of a crop.
        workers: number of processes that decode. With 0, the calling process decodes.
    """
    crop = transforms.Compose([transforms.RandomResizedCrop(side, (0.5, 1)), transforms.ToTensor()])
    return DataLoader(ImageFolder(str(folder), crop), BATCH, shuffle=True, num_workers=workers, drop_last=True)


def _timed(sizes: Iterable[int]) -> Measured:
    """Return the sum of numbers, and the seconds in which they come."""
    began = time.perf_counter()
    return sum(sizes), time.perf_counter() - began


def _crops(folder: Path, **how: Any) -> Measured:
    """Read the training images of a folder, and crop them at random, as for a training."""
    x = load_dataset(folder, image_size=(SIDE, SIDE), stream=True, **how).x_train
    ahead = read_ahead(x, batches(len(x), BATCH, 0, 0))
    return _timed(len(resized_crop(to_float(images), 0, ids)) for ids, images in ahead)


def _first_start(folder: Path, workers: int) -> Measured:
    """Decode the training images and the held-out images of a folder into a copy."""
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        images = load_dataset(folder, image_size=(SIDE, SIDE), stream=True, cache=cache, workers=workers)
        return len(images.x_train) + len(images.x_test), time.perf_counter() - began


def _loader(folder: Path, workers: int) -> Measured:
    return _timed(len(images) for images, _ in loader(folder / "train", SIDE, workers))


def _step(_: Path) -> Measured:
    """Train a ResNet-18 of torchvision on clean images. The first step is not measured."""
    torch.manual_seed(0)
    task = ClassifierTask(ForeignClassifier("torchvision:resnet18", 3, 10, 0.5, 0.5), ClassifierConfig())
    batch = Batch(torch.rand(BATCH, 3, SIDE, SIDE), torch.arange(BATCH), torch.arange(BATCH), 0)
    train_step(task, batch)
    return _timed(BATCH for _ in range(4) if train_step(task, batch))


def _broken(folder: Path, choice: str) -> Measured:
    """Start a training on a folder in which an image is cut off.

    Returns:
        0, because most of the seconds are not for reading, and the seconds of the command.

    Raises:
        RuntimeError: the command did not do what ``--broken`` says, or did not name the image.
    """
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "images"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".purify_fast"))
        cut = copy / "train/class3/13.jpg"
        cut.write_bytes(cut.read_bytes()[:1000])
        length = f"--batch-size {BATCH} --epochs 1 --steps-per-epoch 2"
        words = f"train classifier --data images --size {SIDE} --device cpu --width 4 {length} --broken {choice}"
        began = time.perf_counter()
        try:
            text, skipped = called(words.split(), place)[0], True
        except RuntimeError as error:
            text, skipped = str(error), False
        seconds = time.perf_counter() - began
    said = "are left out" if skipped else "cannot be decoded"
    if skipped != (choice == "skip") or said not in text or "train/class3/13.jpg" not in text:
        raise RuntimeError(f"--broken {choice} on a folder with a broken image printed:\n{text}")
    return 0, seconds


#: For each measurement its function of the image folder.
READINGS: dict[str, Callable[[Path], Measured]] = {
    "`--decode each_time`, 1 thread": partial(_crops, decode="each_time", workers=1),
    "`--decode each_time`, 2 threads": partial(_crops, decode="each_time", workers=2),
    "`--decode once`, the first start, 1 thread": partial(_first_start, workers=1),
    "`--decode once`, the first start, 2 threads": partial(_first_start, workers=2),
    "`--decode once`, from the decoded copy": _crops,
    "a DataLoader, 0 workers": partial(_loader, workers=0),
    "a DataLoader, 1 worker": partial(_loader, workers=1),
    "a DataLoader, 2 workers": partial(_loader, workers=2),
    "four training steps of a ResNet-18, 8 images each": _step,
    "a broken image, `--broken refuse`: the command ends and names it": partial(_broken, choice="refuse"),
    "a broken image, `--broken skip`: the command names it and trains": partial(_broken, choice="skip"),
}


def measured(what: str, folder: Path) -> Row:
    """Return the seconds of a measurement, and its images per second; 0 if it is not about reading.

    Args:
        what: a key of `READINGS`.
        folder: image folder with a file ``train/class3/13.jpg``.
    """
    images, seconds = READINGS[what](folder)
    return {"seconds": round(seconds, 2), "rate": round(images / seconds, 1)}
