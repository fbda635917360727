"""``purify-fast plan``: what is counted, what a probe continues, and what is refused."""

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
from purify_fast.speed.counting import GPUS, Cost, counted
from purify_fast.speed.run_cost import Forecast, amount, in_words
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack
from purify_fast.training.probed_steps import forecast

pytestmark = pytest.mark.usefixtures("one_thread")


def linear_task(steps=3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    attack = TrainingAttack(eps=0.1, steps=steps)
    return ClassifierTask(model, ClassifierConfig(attack=attack, **options))


def images(count=64):
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8), torch.arange(count) % 2


def test_products_are_counted_exactly():
    """A forward pass is one product, each step of PGD has one more backward, and the update of the weights one."""
    planned = forecast(linear_task(), *images(), FitConfig(3, 16), gpu="h100")
    product = 2 * 16 * 64 * 2
    # three steps with a gradient to the images, one update with a gradient to the weights; 3 epochs of 4 batches
    assert planned.cost.flop == 12 * (3 * 2 + 2) * product
    held = forecast(linear_task(), *images(), FitConfig(3, 16, validation_share=0.25), gpu="h100")
    # 3 batches of 16 in an epoch, and after each a validation of 16 images by ten steps
    assert held.cost.flop == 9 * (3 * 2 + 2) * product + 3 * (10 * 2 + 1) * product


def test_memory_of_a_training_holds_weights_optimizer_and_activations():
    planned = forecast(linear_task(), *images(), FitConfig(1, 64), gpu="h100")
    # weights, AdamW's two averages, and a batch of images in several copies
    assert 3 * 128 * 4 + 64 * 64 * 4 < planned.memory < 60 * 64 * 64 * 4


class Delayed(ClassifierTask):
    """Its second half has a dozen more products."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(SmallCNN(1, 2, (8, 8), 2), ClassifierConfig())
        self.large = torch.randn(400, 400)

    def terms(self, length):
        return {"late": length.steps // 2}

    def training_step(self, batch):
        loss, metrics = super().training_step(batch)
        if batch.step >= 6:
            for _ in range(12):
                self.large @ self.large
        return loss, metrics


def test_a_delayed_term_costs_from_its_step_on():
    planned = forecast(Delayed(), *images(), FitConfig(3, 16), seconds=0.1)
    assert 6 * 12 * 2 * 400**3 < planned.cost.flop < 1.1 * 6 * 12 * 2 * 400**3
    assert planned.seconds > 0 and planned.memory > 10**8


def test_an_evaluation_is_counted_in_proportion_to_its_images(monkeypatch):
    monkeypatch.setattr(evaluations, "COUNTED", 4)
    model = zoo.load("digits-arrest")
    digits = setting.digits()
    x, y = to_float(digits.x_test[:16]), digits.y_test[:16]
    options = {"eps": 0.2, "attacks": [PGD(steps=3), APGD(steps=3)]}
    few, many = (evaluations.forecast(model, x[:n], y[:n], gpu="h100", **options) for n in (4, 16))
    weights = sum(p.nbytes for p in model.parameters())
    assert many.cost.flop == pytest.approx(4 * few.cost.flop)
    assert many.memory - weights == pytest.approx(4 * (few.memory - weights), rel=0.2)
    # both fit into one batch
    assert many.cost.launches == few.cost.launches
    timed = evaluations.forecast(model, x, y, seconds=0.5, **options)
    assert 0.01 < timed.seconds < 100


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


def test_the_time_on_a_gpu_is_the_longest_of_three():
    gpu = GPUS["h100"]
    assert Cost(1e6, 0, 0).limit(gpu, gpu.tf32)[1] == pytest.approx(9.0)
    assert Cost(0, 6e12, 0).limit(gpu, gpu.tf32)[1] == pytest.approx(2.0)
    assert Cost(0, 0, 0.6 * 395e12).limit(gpu, gpu.tf32)[1] == pytest.approx(1.0)
    two = Forecast("a run", Cost(0, 0, 0.6 * 790e12), 1e9, None, "h100", 2, "bfloat16")
    assert two.time == pytest.approx(0.5) and "It has not been measured" in two.to_text()
    assert re.search(r"time +under a second, limited by products\n", two.to_text())
    slow = Forecast("a run", Cost(2.891e6, 3e12, 0), 1e9, None, "h100").to_text()
    assert re.search(r"launched +2.89 million\n", slow) and re.search(r"time +26 s, limited by launching\n", slow)
    here = Forecast("a run", Cost(2.3e5, 0, 0), 1e9, 30.0).to_text()
    assert "launch" not in here and re.search(r"time +30 s\n", here)
    assert [in_words(seconds) for seconds in (0.4, 3, 600, 9000)] == ["under a second", "3 s", "10 min", "2.5 h"]
    numbers = {0: "0", 999.4: "999", 2.3e5: "230 thousand", 999_900: "1 million", 1.5e9: "1.5 billion"}
    assert {number: amount(number) for number in numbers} == numbers
    x = torch.randn(8, 8)
    assert counted(lambda: x @ x).flop == 2 * 8**3


@pytest.mark.slow
def test_the_command(capsys, short_signs):
    train = ["train", "classifier", "--data", "digits", "--eps", "0.2", "--steps", "2", "--epochs", "2", "--width", "4"]
    for words, text in (
        (["plan", *train], r"steps of \d+ images on this CPU:"),
        (["plan", "--device", "h200", "--gpus", "8", *train], r"on 8 h200:"),
        (["plan", "evaluate", "zoo:digits-standard", "--protocol", "fast", "--images", "8"], "8 images on this CPU:"),
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
        ("plan --gpus 2 train classifier", "--gpus above 1 needs --device h100, h200 or a100, got --gpus 2"),
        ("plan train arrest", "needs --classifier FOLDER"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message, capsys):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err
