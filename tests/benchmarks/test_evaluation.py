"""The contest against the official AutoAttack: finished contests are kept, and the table says what the results say."""

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks import __main__ as program
from benchmarks.robustness import contests
from benchmarks.robustness.counted_model import CountedModel
from purify_fast.attacks import Square
from purify_fast.attacks.gradient_copy import Copies


@pytest.fixture
def model(monkeypatch):
    """A model that is not trained, on few images, in the place of the real ones, and a model that is not there."""
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), torch.rand(12, 1, 8, 8)
    y = plain(x).argmax(1)

    def missing(folder):
        raise ValueError("it is not in the zoo")

    contestants = {who: contests.CONTESTANTS[who] for who in ("AutoAttack", "fast")}
    known = {
        "plain": contests.Contest(lambda folder: contests.Subject(plain, x, y, 0.05), contestants, lambda: plain),
        "to come": contests.Contest(missing, contestants),
    }
    monkeypatch.setattr(contests, "CONTESTS", known)
    monkeypatch.setattr(contests, "PARTS", {"AutoAttack": 3})
    return plain


@pytest.mark.slow
def test_a_contest_goes_on_by_its_parts(model, tmp_path, monkeypatch, capsys):
    """Images left are kept one by one; a protocol with other attacks runs again, and a missing model is reported."""
    arguments = ["evaluation", "plain", "to come", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(contests, "QUICK", dataclasses.replace(contests.QUICK, images=7))
    run, made = contests._run, []
    monkeypatch.setattr(contests, "_run", lambda *given: made.append(len(given[1].x)) or run(*given))
    program.main(arguments)
    rows = contests.read(tmp_path)
    assert made == [3, 7, 3, 1] and [len(row["left"]) for row in rows] == [7, 7]
    assert all(set(row["left"]) <= set("01") and row["forwards"] > row["gradients"] > 0 for row in rows)
    monkeypatch.setitem(contests.CONTESTS["plain"].contestants, "fast", contests.Protocol("standard"))
    program.main(arguments)
    again = contests.read(tmp_path)
    assert made[4:] == [7] and again[0] == rows[0] and again[1]["code"] != rows[1]["code"]
    assert "to come is left out: it is not in the zoo" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_of_other_attacks_or_weights_are_found_and_made_again(model, tmp_path, monkeypatch):
    """The official attack's rows stay, as long as weights and images do."""
    arguments = ["evaluation", "plain", "--quick", "--out", str(tmp_path / "studies")]
    program.main(arguments)
    assert contests.outdated(tmp_path) == []
    before = contests.read(tmp_path / "studies")
    monkeypatch.setattr(Square, "revision", lambda self: "another")
    (line,) = contests.outdated(tmp_path)
    assert line.startswith("robust.json: fast of the contest 'plain' was made by other attacks")
    program.main(arguments)
    official, fast = contests.read(tmp_path / "studies")
    assert contests.outdated(tmp_path) == [] and official == before[0] and fast != before[1]
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    assert len(contests.outdated(tmp_path)) == 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_forward_and_every_gradient_is_counted_at_the_door(precision):
    """Gradients of one pass by themselves; a copy of the model adds to the same sums."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(False)
    model, x = CountedModel(inner), torch.rand(12, 1, 8, 8)
    followed = Copies(x).copy_for(model, precision)
    assert (followed is model) == (precision == "float32")
    model.counts.forwards = model.counts.gradients = 0
    points = x.clone().requires_grad_()
    logits = followed(points)
    for label in range(3):
        torch.autograd.grad(logits[:, label].sum(), points, retain_graph=True)
    # another pass of the same images, some of them, and one without gradients
    followed(points[:5])[:, 0].sum().backward()
    model(x[:2])
    assert (model.counts.forwards, model.counts.gradients) == (12 + 5 + 2, 3 * 12 + 5)
