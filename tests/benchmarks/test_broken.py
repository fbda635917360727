"""The rebuilt defences: each one predicts, and what an adaptive attack follows has gradients; the score counts."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import __main__ as program
from benchmarks.broken import command, entry
from purify_fast.data import load_dataset, to_float

pytestmark = pytest.mark.usefixtures("one_thread")
DIGITS = [name for name, one in entry.ENTRIES.items() if one.data == "digits" and one.paper]


@pytest.mark.parametrize("name", DIGITS)
def test_a_defence_predicts_and_what_is_followed_has_gradients(name):
    """A few training images are enough for both."""
    digits = load_dataset("digits")
    x, y = to_float(digits.x_train[:64]), digits.y_train[:64]
    torch.manual_seed(0)
    built = entry.ENTRIES[name].build(x, y)
    model, followed = built if isinstance(built, tuple) else (built, built)
    few = x[:4].clone()
    first, second = model(few), model(few)
    assert first.shape == (4, 10) and first.isfinite().all() and torch.equal(few, x[:4])
    assert torch.equal(first, second) is not entry.ENTRIES[name].random
    gradient = torch.autograd.grad(F.cross_entropy(followed(few.requires_grad_()), y[:4]), few)[0]
    assert gradient.isfinite().all() and gradient.flatten(1).any(1).all()


def test_twenty_defences_and_ten_honest_models():
    papers = [one.paper for one in entry.ENTRIES.values()]
    assert sum(map(bool, papers)) >= 20 and papers.count("") >= 10
    assert all(bool(one.paper) == bool(one.attack) for one in entry.ENTRIES.values())


def result(model, judge, robust, **findings):
    return {"model": model, "judge": judge, "robust": robust, "clean": 1.0, "unreliable": [], **findings}


@pytest.mark.parametrize(
    ("robust", "alarms", "truth", "says"),
    [
        ("1100", [], 0.5, "found"), ("1110", [], 0.5, "missed"), ("1110", ["huge radius"], 0.5, "flagged"),
        ("0011", [], 0.0, "missed"),
    ],
)  # fmt: skip
def test_the_score(robust, alarms, truth, says):
    """The truth is what withstands every judge, image by image; found is within two points of it."""
    each = {
        command.ADAPTIVE: result("EMPIR", command.ADAPTIVE, "1100"),
        command.STRONG: result("EMPIR", command.STRONG, robust, unreliable=alarms),
    }
    assert command.left(*each.values()) == truth
    assert command.verdict(each, command.STRONG) == says and command.verdict(each, command.STANDARD) == "-"


def test_results_are_kept_and_a_sign_that_flags_alone_is_named(monkeypatch, tmp_path, capsys):
    """Only what is asked for, not there yet or to be done again is judged."""
    done = []

    def judged(name, judge, settings, data):
        done.append((name, judge))
        robust = "1111" if name == "EMPIR" and judge != command.ADAPTIVE else "1000"
        alarms = ["batch size"] if (name, judge) == ("EMPIR", command.STANDARD) else []
        return {**result(name, judge, robust, unreliable=alarms), "settings": settings}

    monkeypatch.setattr(command, "judged", judged)
    arguments = ["broken", "--quick", "--out", str(tmp_path), "--only", "EMPIR", "a linear classifier"]
    program.main(arguments)
    assert [judge for _, judge in done] == [judge for judge in command.JUDGES for _ in range(2)]
    program.main([*arguments, "--redo", command.STRONG])
    assert done[8:] == done[6:8] and len(json.loads((tmp_path / command.FILE).read_text())) == 8
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert ["EMPIR (Sen et al., ICLR 2020)", entry.ENTRIES["EMPIR"].attack, "4", "100", "25", "100",
            "100 **unreliable**", "100", "flagged", "missed"] in rows  # fmt: skip
    assert ["a linear classifier", "4", "100", "25", "25", "25", "25"] in rows
    assert ["batch size", "1", "0", "EMPIR"] in rows and ["huge radius", "0", "0", "-"] in rows


def test_the_judges_of_a_model(monkeypatch):
    """A defence that rounds has no gradients: its report says so, and what follows the rounding's input breaks it."""
    layer = nn.Linear(256, 10)
    rounding = nn.Sequential(entry.Step(entry.without_gradient(torch.round)), nn.Flatten(), layer)
    through = nn.Sequential(entry.Step(entry.straight_through(torch.round)), nn.Flatten(), layer)
    one = entry.Entry(lambda x, y: (entry.train(rounding, x, y), through), "a paper", "BPDA")
    monkeypatch.setitem(entry.ENTRIES, "rounds", one)
    kept = {}
    for judge in command.JUDGES[:3]:
        kept[judge] = command.judged("rounds", judge, {"images": 8, "steps": 3}, "data")
        assert len(kept[judge]["robust"]) == 8 and "cpu_seconds" in kept[judge]
    assert command.left(kept[command.ADAPTIVE]) < kept[command.ADAPTIVE]["clean"]
    assert kept[command.STANDARD]["unreliable"] or command.left(kept[command.STANDARD]) == 0
