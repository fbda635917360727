"""The contest against the official AutoAttack: finished contests are kept, and the table says what the results say."""

import pytest
import torch
from torch import nn

from benchmarks import __main__ as program
from benchmarks.robustness import contests
from benchmarks.robustness.counted_model import CountedModel
from purify_fast.attacks import APGD, Square
from purify_fast.attacks.gradient_copy import Copies


@pytest.fixture
def made_models(monkeypatch):
    """Two models that are not trained, on few images, in the place of the real ones."""
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 10)
    plain, noisy = nn.Sequential(*layers).eval(), nn.Sequential(*layers).eval()
    noisy.register_forward_hook(lambda layer, given, logits: logits + 1e-3 * torch.randn_like(logits))
    x = torch.rand(12, 1, 8, 8)
    y = plain(x).argmax(1)
    made = []

    def subject(model, random):
        def make(sources):
            made.append(random)
            return contests.Subject(model, x, y, 0.05, random)

        return make

    known = {
        "plain": contests.Contest(subject(plain, False), contests.STANDARD_CONTESTANTS, lambda: plain),
        "noisy": contests.Contest(subject(noisy, True), contests.RAND_CONTESTANTS, lambda: noisy, random=True),
    }
    monkeypatch.setattr(contests, "CONTESTS", known)

    def missing(folder):
        raise ValueError("it is not in the zoo")

    contestants = {who: contests.ROBUST_CONTESTANTS[who] for who in ("AutoAttack", "fast")}
    robust = {"robust": (subject(plain, False), contestants), "to come": (missing, contestants)}
    robust = {name: contests.Contest(*given) for name, given in robust.items()}
    monkeypatch.setattr(contests, "ROBUST", robust)
    monkeypatch.setattr(contests, "PARTS", {"AutoAttack": 3})
    return made


@pytest.mark.slow
def test_a_contest_on_robust_networks_goes_on_by_its_parts(made_models, tmp_path, monkeypatch, capsys):
    """Images left are kept one by one; a protocol with other attacks runs again, and a missing model is reported."""
    arguments = ["evaluation", "--robust", "--quick", "--images", "7", "--out", str(tmp_path)]
    run, made = contests._run, []
    monkeypatch.setattr(contests, "_run", lambda *given: made.append(len(given[1].x)) or run(*given))
    program.main(arguments)
    rows = contests.read(tmp_path, contests.ROBUST_FILE)
    assert made == [3, 7, 3, 1] and [len(row["left"]) for row in rows] == [7, 7]
    assert all(set(row["left"]) <= set("01") and row["forwards"] > row["gradients"] > 0 for row in rows)
    monkeypatch.setitem(contests.ROBUST["robust"].contestants, "fast", contests.Protocol("standard"))
    program.main(arguments)
    again = contests.read(tmp_path, contests.ROBUST_FILE)
    assert made[4:] == [7] and again[0] == rows[0] and again[1]["code"] != rows[1]["code"]
    assert "to come is left out: it is not in the zoo" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_of_other_attacks_or_weights_are_found_and_made_again(made_models, tmp_path, monkeypatch):
    """The official attack's rows stay, as long as weights and images do."""
    arguments = ["evaluation", "--quick", "--out", str(tmp_path / "studies")]
    program.main(arguments)
    assert contests.outdated(tmp_path) == []
    monkeypatch.setattr(Square, "revision", lambda self: "another")
    lines = contests.outdated(tmp_path)
    for line, protocol in zip(lines, ("standard", "fast"), strict=True):
        assert line.startswith(f"evaluation.json: {protocol} of the contest 'plain' was made by other attacks")
    program.main(arguments)
    assert made_models == [False, True, False] and contests.outdated(tmp_path) == []
    before = {(row["contest"], row["contestant"]): row for row in contests.read(tmp_path / "studies")}
    monkeypatch.setattr(APGD, "revision", lambda self: "another")
    assert len(contests.outdated(tmp_path)) == 4
    program.main(arguments)
    kept = [row for row in contests.read(tmp_path / "studies") if row in before.values()]
    assert [row["contestant"] for row in kept] == ["AutoAttack", "AutoAttack rand"]
    with torch.no_grad():
        contests.CONTESTS["plain"].model()[1].weight[0, 0] += 1
    # both contests attack these weights
    assert len(contests.outdated(tmp_path)) == 6


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
