"""The cost of a bank of adversarial images, on digits: CARSO's published objective with fresh attacks and a bank.

Every row trains the same purifier from the same weights on the same base, three seeds. Each is judged by its losses on
held-out images that are attacked afresh, and by the protocols `fast` and `strong`; differences are to fresh attacks of
the same seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from purify_fast import EvaluateConfig, evaluate
from purify_fast.data import to_float
from purify_fast.demo import setting
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.training import BankConfig, Batch, FitConfig, fit, load_classifier
from purify_fast.training.config import TrainingAttack

from . import Job, Work, over_seeds, write_page
from .digits import EPS, DigitsStudy, train_base

FRESH = "fresh attacks"
#: Seeds of the attacks on held-out images, whose losses are averaged.
DRAWS = 5


def images_of(quick: bool) -> dict[str, int]:
    """The number of held-out images that each protocol attacks."""
    return {"fast": 4, "strong": 2} if quick else {"fast": 500, "strong": 200}


def train(job: Job, folder: Path, root: Path) -> dict:
    """Train a purifier with the paper's objective: {base, epochs, bank}, where bank is None for fresh attacks."""
    s, digits = job.settings, setting.digits()
    torch.manual_seed(job.seed)
    defence = Carso(load_classifier(job.folder(root, s["base"])), setting.LAYERS, digits.image_shape, **setting.SIZES)
    task = CarsoTask(defence, CarsoConfig(attack=TrainingAttack(eps=EPS, steps=4 if s["quick"] else 40)))
    epochs = 3 if s["quick"] else s["epochs"]
    bank = BankConfig(**s["bank"], folder=folder / "bank") if s.get("bank") else None
    fit(task, digits.x_train, digits.y_train, FitConfig(epochs, 64, job.seed), folder, bank=bank)
    defence.save(folder)
    result = fresh_losses(task, epochs)
    for protocol, count in images_of(s["quick"]).items():
        x, y = digits.x_test[:count], digits.y_test[:count]
        config = EvaluateConfig(protocol=protocol, seed=job.seed)
        report = evaluate(defence, to_float(x), y, eps=EPS, config=config, out=folder / protocol, progress=False)
        result[protocol] = report.headline.accuracy
        if protocol == "fast":
            result["clean"] = report.row("clean").accuracy
    return result


def fresh_losses(task: CarsoTask, epochs: int) -> dict[str, float]:
    """The purifier's losses on the held-out images, attacked as in the last epoch: nats per image."""
    digits = setting.digits()
    x, y, sums = to_float(digits.x_test), digits.y_test, dict[str, float]()
    for seed in range(DRAWS):
        batch = Batch(x, y, torch.arange(len(x)), seed, epoch=epochs - 1, epochs=epochs)
        for name, value in task.validate(batch).items():
            sums[name] = sums.get(name, 0.0) + float(value) / DRAWS
    return sums


class Bank(DigitsStudy):
    """The study of the cost of a bank of adversarial images, on digits."""

    name = "bank"
    works: ClassVar[dict[str, Work]] = {"classifier": train_base, "purifier": train}

    def write_table(self, results: Sequence[dict], folder: Path, quick: bool) -> Path:
        rows: dict[str, dict[int, dict]] = {}
        for result in results:
            if "loss" in result:
                rows.setdefault(result["name"], {})[result["seed"]] = result

        def mean(name: str, key: str) -> str:
            return over_seeds([result[key] for result in rows[name].values()])

        def nats(values: Sequence[float]) -> str:
            error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            return f"{statistics.fmean(values):.3f}{error}"

        def change(name: str, key: str) -> list[float]:
            fresh = rows.get(FRESH, {}) if name != FRESH else {}
            return [result[key] - fresh[seed][key] for seed, result in rows[name].items() if seed in fresh]

        def to_fresh(name: str, key: str) -> str:
            values = change(name, key)
            return over_seeds(values) if values else "-"

        def loss(name: str, key: str) -> str:
            return nats([result[key] for result in rows[name].values()])

        def loss_to_fresh(name: str, key: str) -> str:
            values = change(name, key)
            return nats(values) if values else "-"

        return write_page(
            folder, self.name, rows=rows, mean=mean, to_fresh=to_fresh, loss=loss, loss_to_fresh=loss_to_fresh,
            quick=quick, images=images_of(quick), draws=DRAWS,
        )  # fmt: skip
