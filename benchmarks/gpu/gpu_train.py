"""Train four models of full size on CIFAR-10 within nine minutes of a card, and judge them by the protocol `fast`.

The models are a ResNet-18 on clean images, a ResNet-18 that is trained adversarially with PGD-10, the first one
finetuned by ARREST, and CARSO's purifier in front of the second one. Each training has a share of the time that is
left. Its number of epochs comes from `Part.rate`, the images per second of a card. If a card is slower, the learning
rate follows the clock instead of the steps, and the training ends with its share.

The weights are written in float16, into files below 16 MB. The models are judged with these weights. CARSO is judged
without its randomness: it decodes the most likely latent.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from purify_fast import data
from purify_fast._files import folder_lock
from purify_fast.defences import StochasticDefence, WithAggregation
from purify_fast.evaluation import EvaluateConfig, evaluate
from purify_fast.methods.arrest import ArrestTask
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.methods.saving import trained_tensors
from purify_fast.models import build_classifier
from purify_fast.speed.folding.inference_copy import convert_to_channels_last
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, Task, fit
from purify_fast.training.callbacks import Callback, TrainingState

from .. import options
from ..robustness.studies.cifar10 import models, study
from ..speed import sheets, timing
from .gpu_check import MOST_BYTES, add_data, device_of
from .gpu_sections import images_of

FILE = "train.csv"
#: The seconds that the evaluation of a model takes, and the seconds at the end of the command.
JUDGING, CLOSING = 20.0, 10.0
STANDARD, ADVERSARIAL, ARREST, CARSO = "standard", "PGD-AT", "ARREST", "CARSO"


@dataclass(frozen=True)
class Size:
    """The sizes of the trainings: width of the networks, training images, images of a batch and judged images."""

    width: int
    images: int
    batch: int
    judged: int
    epochs: int
    #: The amounts of attacks, for the functions of the study on CIFAR-10.
    amounts: SimpleNamespace


def _amounts(steps: int) -> SimpleNamespace:
    return SimpleNamespace(steps=steps, ema_decay=0.995, awp_gamma=0.0)


FULL, REHEARSAL = Size(64, 50_000, 256, 1000, 30, _amounts(10)), Size(4, 200, 50, 4, 2, _amounts(2))
#: The trained models by name, each on the device, in evaluation mode.
Trained = dict[str, nn.Module]


def _fresh(images: data.DataSet, size: Size) -> nn.Module:
    torch.manual_seed(0)
    mean, std = data.statistics(images.x_train)
    sizes = {"width": size.width, "mean": mean, "std": std}
    model = build_classifier("preact_resnet18", images.image_shape, images.num_classes, **sizes)
    return model.to(images.x_train.device)


def _standard(images: data.DataSet, size: Size, trained: Trained) -> tuple[nn.Module, Callable[[], Task]]:
    model = _fresh(images, size)
    convert_to_channels_last(model, images.image_shape)
    return model, lambda: ClassifierTask(model, ClassifierConfig(learning_rate=3e-3, precision="bfloat16"))


def _adversarial(images: data.DataSet, size: Size, trained: Trained) -> tuple[nn.Module, Callable[[], Task]]:
    model = _fresh(images, size)
    return model, lambda: ArrestTask(model, models.adversarial(size.amounts), images.image_shape)


def _arrest(images: data.DataSet, size: Size, trained: Trained) -> tuple[nn.Module, Callable[[], Task]]:
    model = copy.deepcopy(trained[STANDARD])
    # The published schedule cannot follow the clock.
    config = replace(models.finetuning(size.amounts, 50.0, 30.0), schedule="one_cycle")
    return model, lambda: ArrestTask(model, config, images.image_shape)


def _carso(images: data.DataSet, size: Size, trained: Trained) -> tuple[nn.Module, Callable[[], Task]]:
    torch.manual_seed(0)
    mean, std = data.statistics(images.x_train)
    sizes = {"cond_dim": 128, "latent_dim": 64, "samples": 8, "mean": mean, "std": std}
    defence = Carso(copy.deepcopy(trained[ADVERSARIAL]), study.LAYERS, images.image_shape, **sizes)
    defence.to(images.x_train.device)
    attack = models.attack_of(size.amounts)
    how: dict[str, Any] = {"learning_rate": 1e-3, "precision": "bfloat16", "targets": "classifier"}
    return defence, lambda: CarsoTask(defence, CarsoConfig(attack_target="pipeline", attack=attack, **how))


@dataclass(frozen=True)
class Part:
    """One of the trainings.

    Attributes:
        make: function that returns the model before the training, and a function that makes the training of this model.
        epochs: largest number of epochs.
        rate: images per second of a training on a card of the class of an H100. The rates of the adversarial trainings
            follow from measured steps with captured attacks. The rate on clean images is estimated.
        needs: name of the part whose model this training begins with.
    """

    make: Callable[[data.DataSet, Size, Trained], tuple[nn.Module, Callable[[], Task]]]
    epochs: int
    rate: float
    needs: str = ""

    def seconds(self, size: Size) -> float:
        return min(self.epochs, size.epochs) * size.images / self.rate


PARTS = {
    STANDARD: Part(_standard, 30, 15_000),
    ADVERSARIAL: Part(_adversarial, 20, 7_100),
    ARREST: Part(_arrest, 10, 6_000, STANDARD),
    CARSO: Part(_carso, 6, 3_080, ADVERSARIAL),
}


class OutOfTime(Exception):
    """The time of a training has ended."""


@dataclass
class Pace(Callback):
    """Lets a training follow the clock, so that it ends with its time.

    Attributes:
        task: training whose learning rate is lowered by the clock if the clock is ahead of the steps.
        seconds: time of the training.
        images: number of images so far.
        rates: images per second of each finished epoch.
    """

    task: Task
    seconds: float
    images: int = 0
    rates: list[float] = field(default_factory=list)
    began: float = field(default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        by_steps = self.task.learning_rate

        def learning_rate(progress: float, epoch: int, epochs: int) -> float:
            return by_steps(max(progress, min(self.spent, 1.0)), epoch, epochs)

        self.task.learning_rate = learning_rate  # type: ignore[method-assign]

    @property
    def spent(self) -> float:
        """The share of the time that has passed."""
        return (time.monotonic() - self.began) / self.seconds

    def on_step(self, state: TrainingState) -> None:
        self.images += state.images
        if self.spent >= 1 and state.step < state.total_steps:
            raise OutOfTime

    def on_epoch(self, state: TrainingState) -> None:
        self.rates.append(state.images_per_second)


def train(task: Task, images: data.DataSet, size: Size, epochs: int, seconds: float) -> dict:
    """Train a model for some epochs, or until its time has ended. Return the columns of the results file."""
    pace = Pace(task, seconds)
    config = FitConfig(epochs, size.batch, padding=4, flip=images.image_shape[0] == 3)
    try:
        fit(task, images.x_train, images.y_train, config, progress=False, callbacks=[pace])
    except OutOfTime:
        task.finish()
        task.model.eval()
    spent = time.monotonic() - pace.began
    done = pace.images / (len(images.x_train) // size.batch * size.batch)
    fastest = f"{max(pace.rates):.0f}" if pace.rates else ""
    return {
        "epochs": f"{done:.2f}",
        "planned": epochs,
        "seconds": f"{spent:.1f}",
        "images_per_s": f"{pace.images / spent:.0f}",
        "fastest_epoch_images_per_s": fastest,
    }


def write_weights(tensors: dict[str, Tensor], folder: Path, name: str) -> list[Path]:
    """Write tensors into files ``NAME-1.safetensors`` and so on, each below `MOST_BYTES`. Numbers become float16."""
    parts: list[dict[str, Tensor]] = [{}]
    # Leave room for the names and shapes.
    size, most = 0, MOST_BYTES - 200_000
    for key, tensor in tensors.items():
        half = tensor.detach().cpu().contiguous()
        half = half.half() if half.is_floating_point() else half
        size += half.nbytes
        if size > most and parts[-1]:
            parts.append({})
            size = half.nbytes
        parts[-1][key] = half
    paths = [folder / f"{name}-{number}.safetensors" for number in range(1, len(parts) + 1)]
    for path, part in zip(paths, parts, strict=True):
        save_file(part, path)
    return paths


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors that `write_weights` wrote, for ``load_state_dict``."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        found |= load_file(path)
    return found


def judge(model: nn.Module, images: data.DataSet, size: Size, name: str) -> dict:
    """Evaluate a model by the protocol `fast`. Return the columns of the results file."""
    began = time.monotonic()
    judged = WithAggregation(model, deterministic=True).eval() if isinstance(model, StochasticDefence) else model
    x, y = images.x_test[: size.judged], images.y_test[: size.judged]
    config = EvaluateConfig(protocol="fast", dataset_name=images.name)
    report = evaluate(judged, x, y, eps=study.EPS, config=config, name=name, progress=False)
    shares = {"clean": report.row("clean"), "robust": report.headline}
    cells = {key: f"{100 * row.accuracy:.1f}" for key, row in shares.items()}
    return {**cells, "images": len(x), "judged_s": f"{time.monotonic() - began:.1f}"}


def run_part(name: str, images: data.DataSet, size: Size, seconds: float, out: Path, trained: Trained) -> dict:
    """Train a model, write its weights, and judge the model with the written weights.

    Args:
        name: name of the part.
        images: training images and test images, on the device.
        size: sizes of the training.
        seconds: time of the training.
        out: folder of the results.
        trained: models of the earlier parts. The new model is added.

    Returns:
        A row of the results file.
    """
    part = PARTS[name]
    model, make = part.make(images, size, trained)
    # Another copy gets the written weights, because a training accelerates parts of its model.
    judged, task = copy.deepcopy(model), make()
    epochs = max(1, min(part.epochs, size.epochs, int(seconds * part.rate / len(images.x_train))))
    row = {"model": name, **train(task, images, size, epochs, seconds)}
    result = model if isinstance(task, ClassifierTask) else task.result
    tensors = trained_tensors(result) if isinstance(result, Carso) else result.state_dict()
    written = write_weights(tensors, out, name)
    judged.load_state_dict(read_weights(out, name), strict=not isinstance(result, Carso))
    trained[name] = judged.eval()
    return row | {"files": len(written)} | judge(trained[name], images, size, name)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks gpu_train``."""
    rehearse = "rehearse on the CPU: 200 images, small networks, two epochs; the numbers mean nothing"
    parser.add_argument("--rehearse", action="store_true", help=rehearse)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_train"), help="folder for the weights and train.csv")
    parser.add_argument("--seconds", type=float, default=540.0, help="time limit of the command; default: 540")
    kept = "models whose weights are kept"
    options.add_names(parser, PARTS, "--weights", kept)
    add_data(parser)


def main(chosen: argparse.Namespace) -> bool:
    """Run ``python -m benchmarks gpu_train``. Return True if all models were trained and judged."""
    began, device = time.monotonic(), device_of(chosen)
    size = REHEARSAL if chosen.rehearse else FULL
    whole = images_of(chosen.data, "digits" if chosen.rehearse and chosen.data is None else "cifar10")
    few = {key: getattr(whole, key)[: size.images] for key in ("x_train", "y_train")}
    images, trained, rows = replace(whole, **few).to(device), Trained(), []
    size = replace(size, images=len(images.x_train))
    chosen.out.mkdir(parents=True, exist_ok=True)
    with folder_lock(chosen.out):
        for index, (name, part) in enumerate(PARTS.items()):
            later = list(PARTS.values())[index:]
            left = began + chosen.seconds - CLOSING - JUDGING * len(later) - time.monotonic()
            seconds = max(1.0, left * part.seconds(size) / sum(one.seconds(size) for one in later))
            row: dict = {"model": name}
            try:
                if part.needs and part.needs not in trained:
                    raise ValueError(f"the model {part.needs} is missing")
                row = run_part(name, images, size, seconds, chosen.out, trained)
            except Exception as error:
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(row | timing.environment(device))
            sheets.write_csv(chosen.out / FILE, rows)
            print(json.dumps(row), flush=True)
        for name in PARTS.keys() - set(chosen.weights):
            for path in chosen.out.glob(f"{name}-*.safetensors"):
                path.unlink()
    print(f"{chosen.out / FILE}: {time.monotonic() - began:.0f} of {chosen.seconds:g} s", file=sys.stderr)
    return not any("error" in row for row in rows)
