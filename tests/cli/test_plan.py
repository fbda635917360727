"""``purify-fast plan``: what a trial measures and continues, and what is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from examples.demo import setting
from purify_fast import zoo
from purify_fast.attacks import APGD, PGD
from purify_fast.cli import main
from purify_fast.data import to_float
from purify_fast.evaluation import EvaluateConfig, Report
from purify_fast.evaluation import forecast as evaluations
from purify_fast.evaluation.results.rows import Row
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed.run_cost import Forecast, in_words
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, probed_steps

pytestmark = pytest.mark.usefixtures("one_thread")


class Slow(ClassifierTask):
    """Its steps take a second, those of the second half 3 seconds, and each validation of a batch 20 seconds."""

    def __init__(self, clock):
        torch.manual_seed(0)
        self.clock = clock
        super().__init__(SmallCNN(1, 2, (8, 8), 2), ClassifierConfig())

    def terms(self, length):
        return {"late": length.steps // 2}

    def training_step(self, batch):
        self.clock[0] += 1 if batch.step < 6 else 3
        return super().training_step(batch)

    def validate(self, batch):
        self.clock[0] += 20
        return super().training_step(batch)[1] | {"loss": torch.zeros(())}


def test_a_training_takes_its_steps_its_late_steps_and_its_validations(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(probed_steps.time, "perf_counter", lambda: clock[0])
    x, y = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8), torch.arange(64) % 2
    planned = probed_steps.forecast(Slow(clock), x, y, FitConfig(3, 16), seconds=10.0)
    # Three epochs have 4 steps each.
    assert planned.seconds == 6 * 1 + 6 * 3 and planned.memory > 10**8
    held = probed_steps.forecast(Slow(clock), x, y, FitConfig(3, 16), seconds=10.0, validation=(x, y))
    # Each epoch ends with a validation of one batch.
    assert held.seconds == planned.seconds + 3 * 20


def test_a_training_writes_a_checkpoint_after_each_epoch(monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(probed_steps.time, "perf_counter", lambda: clock[0])

    def save(folder, state):
        clock[0] += 7
        saved.append(state["model"].keys() | state["optimizers"].keys())

    monkeypatch.setattr(probed_steps, "save_checkpoint", save)
    x, y = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8), torch.arange(64) % 2
    planned = probed_steps.forecast(Slow(clock), x, y, FitConfig(3, 16), seconds=10.0)
    assert planned.seconds == 6 * 1 + 6 * 3 + 3 * 7 and len(saved) == 1 and saved[0]


def test_an_evaluation_is_measured_on_few_images(monkeypatch):
    monkeypatch.setattr(evaluations, "FEW", 4)
    model, digits = zoo.load("digits-arrest"), setting.digits()
    x, y = to_float(digits.x_test[:16]), digits.y_test[:16]
    planned = evaluations.forecast(model, x, y, seconds=0.5, eps=0.2, attacks=[PGD(steps=3), APGD(steps=3)])
    assert 0.01 < planned.seconds < 100 and planned.memory > 10**8


def stand_in(monkeypatch, make):
    """Let `make` stand in for `evaluate`: from the number of images to rows, and the seconds that no row takes."""
    clock, asked = [0.0], []

    def evaluate_(model, x, y, *, config, attacks, **given):
        asked.append(len(x))
        rows, others = make(len(x), config.has_signs(attacks))
        clock[0] += sum(row.seconds for row in rows) + others
        return Report(rows)

    monkeypatch.setattr(evaluations, "evaluate", evaluate_)
    monkeypatch.setattr(evaluations.time, "perf_counter", lambda: clock[0])
    return asked


def row(name, n, attacked, seconds, fell=0, **more):
    robust = np.arange(n) >= fell
    usual = {"kind": "apgd", "variant": "random", "n_eval": 1, "seed": 0, "data": "", "deterministic": True}
    return Row("m", name, robust=robust, attacked=attacked, seconds=seconds, **usual | more)


def planned(count, seconds, **options):
    x, y = torch.zeros(count, 1, 2, 2), torch.zeros(count).long()
    return evaluations.forecast(nn.Flatten(), x, y, seconds=seconds, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"protocol": None, "probes": None},
        {"protocol": "fast"},
        {"protocol": "authors"},
        {"attacks": []},
        {"attacks": [], "probes": True},
        {"probes": False},
    ],
    ids=str,
)
def test_the_time_has_the_signs_wherever_an_evaluation_asks_for_them(monkeypatch, options):
    """They take 6 seconds and a second for each image, of which there are 64 at most."""
    asked = stand_in(monkeypatch, lambda n, signs: ([], 6 + min(n, 64) if signs else 0))
    config = EvaluateConfig(**{name: value for name, value in options.items() if name != "attacks"})
    found = planned(500, 100.0, config=config, attacks=options.get("attacks"))
    wanted = options.get("probes") is not False and options.get("protocol") != "authors"
    wanted = wanted and (options.get("attacks") is None or options.get("probes") is True)
    assert found.seconds == (70 if wanted else 0)
    assert asked == ([2, 8, 32, 128] if wanted else [2, 8, 32, 128, 500])


def test_an_attack_takes_a_time_for_each_batch_and_for_each_of_its_images(monkeypatch):
    """Half of the images survive the first attack. The attack on the nearest images gets 16 of them at most."""

    def make(n, signs):
        first = row("first", n, n, 2 + n / 8)
        nearest = min(16, n // 2)
        return [first, row("nearest", n, nearest, 1 + nearest / 4, settings={"nearest": 16})], 0

    asked = stand_in(monkeypatch, make)
    # 300 images are two batches.
    assert planned(300, 20.0).seconds == pytest.approx(2 * 2 + 300 / 8 + 1 + 16 / 4)
    # After a slow trial, the next has twice as many images.
    assert planned(300, 8.0).seconds == pytest.approx(2 * 2 + 300 / 8 + 1 + 16 / 4)
    assert asked == [2, 8, 32, 2, 8, 16]
    # A single trial is continued by the number of images.
    assert evaluations._continued([(1, 8, 3.0)], 2, 32) == 12


@pytest.mark.parametrize(("until", "reached", "rounds"), [(1.0, 38, 1), (0.0, 300, 8)])
def test_an_attack_that_stops_takes_the_rounds_that_it_will_make(monkeypatch, until, reached, rounds):
    """A round has 32 images, or an eighth of all. Any round is enough evidence for the share 1, and none for 0."""

    def make(n, signs):
        got = n if until == 0.0 else min(n, 32)
        settings = {"until": [until, 1]}
        return [row("stops", n, n, 4 * -(-got // 32) + got / 4, fell=n // 4, settings=settings, unsearched=n - got)], 0

    stand_in(monkeypatch, make)
    assert planned(300, 24.0).seconds == pytest.approx(4 * rounds + reached / 4)
    # A random model has no evidence that stops an attack.
    stand_in(monkeypatch, lambda n, signs: ([replace(make(n, signs)[0][0], deterministic=False)], 0))
    if until == 0.0:
        assert planned(300, 24.0).seconds == pytest.approx(4 * 2 + 300 / 4)


def test_the_memory_has_a_part_for_each_image_of_a_batch(monkeypatch):
    """A stand-in for the process has 7 GB at first. A trial adds 50 MB, and 1 MB for each image."""
    asked = stand_in(monkeypatch, lambda n, signs: ([row("first", n, n, 1.0)], 0))
    peak = [7e9]
    monkeypatch.setattr(evaluations, "forget_peak", lambda device: peak.__setitem__(0, 0))
    monkeypatch.setattr(evaluations, "peak_so_far", lambda device: max(peak[0], 1e9 + 50e6 + 1e6 * (asked or [0])[-1]))

    def memory(count, **options):
        asked.clear()
        peak[0] = 7e9 if options.pop("large", False) else 0
        return planned(count, 0.0, **options).memory

    assert memory(300) == pytest.approx(1e9 + 50e6 + 250e6)
    assert memory(300, config=EvaluateConfig(batch_size=20)) == pytest.approx(1e9 + 50e6 + 20e6)
    assert memory(1) == pytest.approx(1e9 + 50e6 + 1e6)
    # The images may have needed more when they were read.
    assert memory(300, large=True) == 7e9


def test_the_text_of_a_plan():
    text = Forecast("12 steps", 30.0, 1.5e9).to_text()
    assert re.search(r"^12 steps:\ntime +30 s\nmemory at the peak +1.50 GB\n", text)
    assert [in_words(seconds) for seconds in (0.4, 3, 600, 9000)] == ["under a second", "3 s", "10 min", "2.5 h"]


@pytest.mark.slow
def test_the_command(capsys, short_signs):
    train = ["train", "classifier", "--data", "digits", "--eps", "0.2", "--steps", "2", "--epochs", "2", "--width", "4"]
    for words, text in (
        (["plan", *train], r"steps of \d+ images on cpu:"),
        (["plan", "evaluate", "zoo:digits-standard", "--protocol", "fast", "--images", "8"], "8 images on cpu:"),
    ):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert (
            re.search(text, out)
            and re.search(r"time +(\d|under a second)", out)
            and re.search(r"memory at the peak +\d", out)
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan", "plan needs a command"),
        ("plan train arrest", "needs --classifier FOLDER"),
        ("plan evaluate zoo:digits-standard --precision bfloat16 --images 8", "only for defences of this package"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message, capsys):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err
