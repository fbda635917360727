"""The rebuilt defences: each one predicts, and what an adaptive attack follows has gradients; the score counts."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from benchmarks import __main__ as program
from benchmarks.robustness.broken import adaptive, entry, run_broken as tables
from purify_fast.data import load_dataset, to_float

DIGITS = [name for name, one in entry.ENTRIES.items() if one.data == "digits" and one.paper]


@pytest.mark.slow
@pytest.mark.parametrize("name", DIGITS)
def test_a_defence_predicts_and_what_is_followed_has_gradients(name):
    """A few training images are enough for both; whatever the adaptive attack follows was built."""
    digits = load_dataset("digits")
    x, y = to_float(digits.x_train[:64]), digits.y_train[:64]
    torch.manual_seed(0)
    built = entry.ENTRIES[name].build(x, y)
    models = built if isinstance(built, tuple) else (built,)
    model, few = models[0], x[:4].clone()
    first, second = model(few), model(few)
    assert first.shape == (4, 10) and first.isfinite().all() and torch.equal(few, x[:4])
    assert torch.equal(first, second) is not entry.ENTRIES[name].random
    follows = {part.follows for part in adaptive.chain(entry.ENTRIES[name])}
    assert follows >= {*range(1, len(models))} and max(follows) < len(models)
    for followed in models[1:] or models:
        leaf = few.clone().requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(followed(leaf), y[:4]), leaf)[0]
        assert gradient.isfinite().all() and gradient.flatten(1).any(1).all()


def result(model, judge, robust="", **findings):
    return {"model": model, "judge": judge, "robust": robust, "clean": 1.0, "unreliable": [], **findings}


@pytest.mark.parametrize(
    ("robust", "alarms", "says"),
    [
        ("1100", [], "found"),
        ("1110", [], "missed"),
        ("1110", ["missed images"], "flagged"),
        ("1000", [], "found"),
        # as many as the truth, of other images
        ("0011", [], "found"),
        # attacked on the first two only, both of which the adaptive attack left
        ("11", [], "found"),
    ],
)
def test_the_truth_is_the_adaptive_attack_alone(robust, alarms, says):
    """What other judges left does not change it; found is within two points of it, or below."""
    each = {
        tables.ADAPTIVE: result("EMPIR", tables.ADAPTIVE, "1100"),
        tables.STRONG: result("EMPIR", tables.STRONG, robust, unreliable=alarms),
    }
    assert tables.verdicts(each) == {tables.OFFICIAL: "-", tables.STANDARD: "-", tables.STRONG: says}
    assert set(tables.verdicts({tables.STRONG: each[tables.STRONG]}).values()) == {"-"}


@pytest.fixture
def judging(monkeypatch):
    """Results that cost nothing: an adaptive attack leaves one image of four, other judges of EMPIR leave all."""
    done = []

    def judged(name, judge, settings, data):
        done.append((name, judge))
        missed = name == "EMPIR" and judge in tables.ATTACKERS
        alarms = ["batch size"] if (name, judge) == ("EMPIR", tables.STANDARD) else []
        made = result(name, judge, "1111" if missed else "1000", unreliable=alarms)
        made |= {"settings": settings, "code": tables.code(name, judge)}
        return made

    monkeypatch.setattr(tables, "judged", judged)
    return done


def test_a_result_of_other_code_is_found_and_made_again(judging, monkeypatch, tmp_path):
    """A changed defence, other options of its adaptive attack and another limit of a sign outdate what they made."""
    arguments = ["broken", "--quick", "--out", str(tmp_path), "--only", "EMPIR", "bit-depth reduction"]
    program.main(arguments)
    assert tables.outdated(tmp_path) == [] and len(judging) == 8
    with monkeypatch.context() as changed:
        changed.setattr(tables.signs, "MOST_MISSED", 0.5)
        found = tables.outdated(tmp_path)
        assert len(found) == 4 and all(" standard of " in line or " strong of " in line for line in found)
    with monkeypatch.context() as changed:
        longer = dataclasses.replace(entry.ENTRIES["EMPIR"], chain=adaptive.long(1))
        changed.setitem(entry.ENTRIES, "EMPIR", longer)
        (line,) = tables.outdated(tmp_path)
        assert "adaptive of 'EMPIR' was made by other attacks" in line
        program.main(arguments)
        assert judging[8:] == [("EMPIR", tables.ADAPTIVE)] and not tables.outdated(tmp_path)
