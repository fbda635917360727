"""Robust accuracy against minutes: costly and cheap adversarial training of a PreActResNet-18 on CIFAR-10.

Every form trains from the same weights with the same loop, with three numbers of epochs, so that each has a curve. The
trained models are judged by `standard`. A stopped training is resumed; a finished training is not repeated. The time of
a training is the median of its steps' times, multiplied by their number: processor time, and on a GPU the time until
the device has finished the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from purify_fast import EvaluateConfig, evaluate
from purify_fast._files import folder_lock, write_text
from purify_fast.data import statistics as channel_statistics
from purify_fast.data import to_float
from purify_fast.models import build_classifier
from purify_fast.training import (
    Callback,
    ClassifierConfig,
    ClassifierTask,
    TrainingAttack,
    TrainingState,
    fit,
    save_classifier,
)

from . import RESULTS, measure, options, style
from .report import table as markdown
from .studies import Job, run
from .studies.cifar10.models import held_out, images_of, loop
from .studies.cifar10.study import EPS, Training

FILE, PICTURE = "minutes.json", Path(__file__).parents[1] / "docs" / "pictures" / "minutes.png"


class Form(NamedTuple):
    """A form of adversarial training: its attack's steps, its use, and passes over the images in an epoch."""

    steps: int
    adversarial: str = "pgd"
    alpha: float | None = None
    passes: int = 1


FORMS = {
    "PGD-10": Form(10),
    "PGD-5": Form(5),
    "PGD-2": Form(2),
    # This is one step of 1.25 eps from a uniform start, as in Wong et al. (ICLR 2020).
    "FGSM-RS": Form(1, alpha=1.25 * EPS),
    "N-FGSM": Form(1, "n_fgsm"),
    "NuAT": Form(1, "nuat"),
    "Free-4": Form(4, "free", passes=4),
}
#: Passes over the images; the free form trains on each batch four times, and has a quarter of the epochs.
PASSES = (4, 8, 16)
#: Number of held-out training images that reveal a collapse at the end of every epoch.
WATCHED = 1000


class StepTimes(Callback):
    """The seconds of each step except the first three, which verify kernels and allocate memory.

    Args:
        device: device of the training.
    """

    def __init__(self, device: str):
        self.on_gpu, self.seconds, self._last = device != "cpu", list[float](), self._now(device != "cpu")
        self._epoch = -1

    @staticmethod
    def _now(on_gpu: bool) -> float:
        if not on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_step(self, state: TrainingState) -> None:
        now = self._now(self.on_gpu)
        # The time of a step after a validation includes the validation.
        if state.epoch == self._epoch:
            self.seconds.append(now - self._last)
        self._epoch, self._last = state.epoch, now


def train(job: Job, folder: Path, root: Path) -> dict[str, Any]:
    """Train a form with a number of passes: {form, passes, budget, images, data, device}."""
    s, form = job.settings, FORMS[job.settings["form"]]
    images, config = images_of(job), configuration(form)
    torch.manual_seed(job.seed)
    mean, std = channel_statistics(images.x_train)
    model = build_classifier("preact_resnet18", images.image_shape, 10, width=s["budget"].width, mean=mean, std=std)
    task, times = ClassifierTask(model.to(s["device"]), config), StepTimes(s["device"])
    epochs = s["passes"] // form.passes
    fitting = loop(job, epochs, on_collapse="back_off")
    last = fit(
        task, images.x_train, images.y_train, fitting, folder, title=job.name, callbacks=[times],
        validation=held_out(job, WATCHED),
    )  # fmt: skip
    save_classifier(model, folder)
    write_steps(folder, times.seconds)
    x, y = to_float(images.x_test[: s["images"]]), images.y_test[: s["images"]]
    config = EvaluateConfig(protocol="standard", seed=job.seed)
    report = evaluate(model, x, y, eps=EPS, config=config, out=folder / "standard", name=job.name)
    steps = epochs * (len(images.x_train) // s["budget"].batch_size)
    judged = report.headline
    return {
        "form": s["form"], "passes": s["passes"], "epochs": epochs, "width": s["budget"].width, "images": s["images"],
        "seconds_per_step": read_seconds(folder), "minutes_of_training": steps * read_seconds(folder) / 60,
        "clean": report.row("clean").accuracy, "standard": judged.accuracy, "reliable": judged.reliable,
        "watched": last["validation_accuracy"], **measure.environment(torch.device(s["device"])),
    }  # fmt: skip


def configuration(form: Form) -> ClassifierConfig:
    """The training of a form: AdamW with one cycle of rates, bfloat16, and eps that rises in the first fifth."""
    attack = TrainingAttack(eps=EPS, steps=form.steps, alpha=form.alpha, eps_warmup=0.2)
    return ClassifierConfig(attack=attack, adversarial=form.adversarial, precision="bfloat16")  # type: ignore[arg-type]


def write_steps(folder: Path, seconds: Sequence[float]) -> None:
    """Keep the median of the steps' times, for a run that resumes after its training."""
    if seconds:
        write_text(folder / "seconds.json", json.dumps(statistics.median(seconds)))


def read_seconds(folder: Path) -> float:
    """Read the file of `write_steps`."""
    return float(json.loads((folder / "seconds.json").read_text()))


def jobs(chosen: argparse.Namespace) -> list[Job]:
    """The trainings, the short ones first."""
    budget = Training(width=chosen.width)
    shared = {"budget": budget, "images": chosen.images, "data": chosen.data, "device": chosen.device}
    return [
        Job(f"{name} {passes}", 0, train, settings={"form": name, "passes": passes, **shared})
        for passes in chosen.passes
        for name in chosen.forms
    ]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks minutes``."""
    parser.add_argument("--forms", nargs="+", type=options.one_of(FORMS), default=list(FORMS), help="which; all")
    parser.add_argument(
        "--passes", nargs="+", type=options.at_least_one, default=list(PASSES),
        help="over the images, multiples of 4; 4 8 16 by default",
    )  # fmt: skip
    parser.add_argument("--width", type=options.at_least_one, default=16, help="of the network; 16, a ResNet-18 has 64")
    parser.add_argument("--images", type=options.at_least_one, default=1000, help="that `standard` attacks; 1000")
    parser.add_argument("--data", default="data", help="folder with cifar10.npz or the official files")
    parser.add_argument("--device", default="cpu", help="where it trains; cpu by default")
    parser.add_argument("--workers", type=options.at_least_one, default=1, help="trainings side by side; 1 by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/minutes"), help="where trainings are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "studies", help="folder for the results")


def check(chosen: argparse.Namespace) -> None:
    """Raise ValueError for a number of passes that the free form cannot have."""
    for passes in chosen.passes:
        if passes % 4:
            raise ValueError(f"--passes must be multiples of 4, got {passes}: the free form takes four at once")


def main(chosen: argparse.Namespace) -> Path:
    """Train and judge, and write the results after each training; results of other widths and devices stay."""
    path = chosen.out / FILE
    with folder_lock(chosen.runs):
        for job in jobs(chosen):
            row = run([job], chosen.runs, chosen.workers)[0]
            rows = json.loads(path.read_text()) if path.is_file() else []
            rows = [other for other in rows if _key(other) != _key(row)] + [row]
            write_text(path, json.dumps(sorted(rows, key=_key), indent=1) + "\n")
    if chosen.out == RESULTS / "studies":
        picture([other for other in rows if _key(other)[:2] == _key(row)[:2]], PICTURE)
    return path


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["device"], row["width"], list(FORMS).index(row["form"]), row["passes"]


def table(results: Path) -> list[str]:
    """The lines of docs/training.md.

    Args:
        results: the folder ``benchmarks/results``.
    """
    rows = json.loads((results / "studies" / FILE).read_text())
    body = [
        [
            row["form"], str(row["passes"]), f"{row['minutes_of_training']:.0f}", f"{100 * row['clean']:.1f}",
            f"{100 * row['standard']:.1f}" + ("" if row["reliable"] else " **unreliable**"),
        ]
        for row in rows
    ]  # fmt: skip
    about = "; ".join(dict.fromkeys(f"width {row['width']}, {row['images']} images, {row['device']}" for row in rows))
    return [f"{about}.", "", *markdown(["form", "passes", "minutes", "clean, %", "`standard`, %"], body)]


def picture(rows: list[dict[str, Any]], path: Path) -> bool:
    """Draw each form's accuracy under `standard` over its minutes; False without matplotlib.

    Args:
        rows: rows of one device and width.
        path: the PNG file that is written.
    """
    figure = style.new_figure(figsize=(7, 4))
    if figure is None:
        return False
    axes = figure.add_subplot()
    style.plain_axes(axes)
    for marker, form in zip("osD^v*P", FORMS, strict=True):
        own = sorted((row for row in rows if row["form"] == form), key=lambda row: row["minutes_of_training"])
        minutes, robust = [row["minutes_of_training"] for row in own], [100 * row["standard"] for row in own]
        color = style.PLAIN if form.startswith("PGD") else None
        axes.plot(minutes, robust, marker=marker, color=color, linewidth=1.2, label=form)
    axes.set_xscale("log")
    axes.set_xlabel("minutes of training", fontsize=9.5)
    axes.set_ylabel("left by standard, %", fontsize=9.5)
    axes.legend(fontsize=8.5, frameon=False)
    style.save(figure, path)
    return True
