"""``purify-fast plan``: what a trial measures and continues, and what is refused."""

import re

import pytest
import torch
from torch import nn

from purify_fast import zoo
from purify_fast.attacks import APGD, PGD
from purify_fast.cli import main
from purify_fast.data import to_float
from purify_fast.demo import setting
from purify_fast.evaluation import EvaluateConfig, Report
from purify_fast.evaluation import forecast as evaluations
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


def test_an_evaluation_is_measured_on_few_images(monkeypatch):
    monkeypatch.setattr(evaluations, "FEW", 4)
    model, digits = zoo.load("digits-arrest"), setting.digits()
    x, y = to_float(digits.x_test[:16]), digits.y_test[:16]
    planned = evaluations.forecast(model, x, y, seconds=0.5, eps=0.2, attacks=[PGD(steps=3), APGD(steps=3)])
    assert 0.01 < planned.seconds < 100 and planned.memory > 10**8


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
    """A stand-in for `evaluate` takes a second for the signs; the signs of 8 images are continued to 16."""
    asked = []

    def evaluate_(model, x, y, *, config, attacks, **given):
        asked.append(config.probes)
        clock[0] += 100 if config.has_signs(attacks) else 1
        return Report()

    clock = [0.0]
    monkeypatch.setattr(evaluations, "evaluate", evaluate_)
    monkeypatch.setattr(evaluations.time, "perf_counter", lambda: clock[0])
    x, y = torch.rand(16, 1, 8, 8), torch.zeros(16).long()
    config = EvaluateConfig(**{name: value for name, value in options.items() if name != "attacks"})
    planned = evaluations.forecast(nn.Flatten(), x, y, seconds=0.0, config=config, attacks=options.get("attacks"))
    wanted = options.get("probes") is not False and options.get("protocol") != "authors"
    wanted = wanted and (options.get("attacks") is None or options.get("probes") is True)
    assert planned.seconds == (200 if wanted else 0)
    assert asked == [False, False] + [options.get("probes")] * wanted


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
