"""The exact decisions against a known answer, planted counterexamples, and the results that are kept. The tests of
the contest against AutoAttack and of packed models follow."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from torch import nn

from benchmarks import RESULTS, __main__ as program
from benchmarks.robustness import contests, pack_zoo, revisions
from benchmarks.robustness.counted_model import CountedModel
from benchmarks.robustness.truth import exact, run_truth, subjects
from benchmarks.robustness.truth.relu_layers import affine_layers
from purify_fast import zoo as packed
from purify_fast.attacks import APGD, Square
from purify_fast.attacks.gradient_copy import Copies
from purify_fast.training.run import read_model
from purify_fast.zoo import read_card


def sharp(seed, build, *sizes):
    """An untrained network whose classes change within small distances."""
    torch.manual_seed(seed)
    model = build(*sizes).requires_grad_(False)
    for layer in model:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.weight *= 2
    return model


def by_enumeration(layers, low, high, y):
    """The least margin over a box of two pixels: a piecewise linear function has it at a corner of a piece."""
    lines = [(torch.tensor([1.0, 0.0]).double(), end[0]) for end in (low, high)]
    lines += [(torch.tensor([0.0, 1.0]).double(), end[1]) for end in (low, high)]
    # within a piece of the first layer, the units of the second are lines too: those of every pattern are taken
    first, second = layers[:2]
    lines += [(weight, -bias) for weight, bias in zip(*first, strict=True)]
    for pattern in itertools.product((0.0, 1.0), repeat=len(first.bias)):
        on = torch.tensor(pattern).double()
        weights, biases = second.weight @ (on[:, None] * first.weight), second.weight @ (on * first.bias) + second.bias
        lines += [(weight, -bias) for weight, bias in zip(weights, biases, strict=True)]
    # where two classes other than y are level, no corner lies: each margin is looked at by itself
    weights, values = torch.stack([a for a, _ in lines]), torch.stack([torch.as_tensor(b).double() for _, b in lines])
    pairs = torch.combinations(torch.arange(len(lines)))
    matrices = weights[pairs]
    crossing = matrices.det().abs() > 1e-9
    corners = torch.linalg.solve(matrices[crossing], values[pairs][crossing])
    corners = corners[((corners >= low - 1e-12) & (corners <= high + 1e-12)).all(1)].clamp(low, high)
    return exact.margins(layers, corners, y).min()


def test_decisions_are_those_of_an_enumeration():
    """Every radius on both sides of the one at which a network of two pixels and two hidden layers falls."""
    seen = set()
    for seed in range(10):
        layers = affine_layers(sharp(seed, subjects.perceptron, 2, 4, 4, 3), (1, 1, 2))
        x = torch.rand(2, generator=torch.Generator().manual_seed(seed))
        y = int(exact.forward(layers, x[None].double()).argmax())
        for eps in (0.02, 0.15, 0.6):
            low, high = ((x.double() + sign * eps).clamp(0, 1) for sign in (-1, 1))
            least, decision = by_enumeration(layers, low, high, y), exact.decide(layers, x, y, eps)
            assert decision.verdict == (exact.FALLS if least <= 0 else exact.ROBUST), (seed, eps, least)
            if decision.point is not None:
                assert ((decision.point >= low) & (decision.point <= high)).all()
                assert exact.margins(layers, decision.point[None], y).min() <= 0
            seen.add((decision.verdict, decision.how))
    assert (exact.ROBUST, exact.BOUND) in seen and (exact.FALLS, exact.POINT) in seen


@pytest.mark.slow
@pytest.mark.parametrize("build", [(subjects.perceptron, 9, 12, 12, 4), (subjects.convolution, 2, 2, 1, 3, 6)])
def test_the_program_alone_decides_alike(build, monkeypatch):
    """Without a search for points, and without bounds, it finds a point within the ball, or the proof that none is."""
    layers = affine_layers(sharp(1, *build), (1, 3, 3))
    x = torch.rand(6, 1, 3, 3)
    y = exact.forward(layers, x.flatten(1).double()).argmax(1).tolist()
    cases = [(a, b, eps) for a, b in zip(x, y, strict=True) for eps in (0.05, 0.4)]
    whole = [exact.decide(layers, a, b, eps).verdict for a, b, eps in cases]
    monkeypatch.setattr(exact, "search", lambda *_: None)
    monkeypatch.setattr(exact, "lowest", lambda layers, functions, *_: torch.full_like(functions.bias, -100.0))
    alone = [exact.decide(layers, a, b, eps) for a, b, eps in cases]
    assert [one.verdict for one in alone] == whole and {one.how for one in alone} == {exact.MILP}
    assert {exact.ROBUST, exact.FALLS} == set(whole)
    monkeypatch.undo()
    monkeypatch.setattr(exact, "search", lambda *_: None)
    hard = [case for case, one in zip(cases, alone, strict=True) if one.verdict == exact.FALLS]
    assert exact.decide(layers, *hard[0], seconds=0.0).verdict == exact.UNDECIDED


def test_a_purifier_is_a_network_of_relus():
    """Its clip is two of them; what is no such network is refused."""
    model = subjects.purified(16, 5, 6).requires_grad_(False)
    layers, x = affine_layers(model, (1, 4, 4)), torch.rand(5, 1, 4, 4)
    torch.testing.assert_close(exact.forward(layers, x.flatten(1).double()).float(), model(x))
    image = torch.rand(1, 16) * 4 - 2
    torch.testing.assert_close(model[4:8](image), image.clamp(0, 1))


def test_what_is_no_such_network_is_refused():
    with pytest.raises(ValueError, match="must be affine between its ReLUs"):
        affine_layers(nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.SiLU(), nn.Linear(4, 3)), (1, 3, 3))


def test_a_planted_counterexample_is_one_and_the_committed_verdicts_are_those_of_the_weights():
    made = subjects.hidden()
    verdicts = made.verdicts()
    truths = {row["subject"]: row["verdicts"] for row in run_truth.read(RESULTS / "cpu")["truth"]}
    assert verdicts == [letters for name in subjects.HIDDEN for letters in truths[name]]
    assert (made.corner - made.x).abs().max() <= subjects.EPS + 1e-7
    for k, model in enumerate(made.models()):
        corner, x = (images[k].view(-1, 1, 8, 8) for images in (made.corner, made.x))
        fooled = (model(x).argmax(1) == made.y[k]) & (model(corner).argmax(1) != made.y[k])
        assert fooled.tolist() == [letter in "fp" for letter in verdicts[k]]


NAMES = ["digits, perceptron", "gap 1", subjects.CONSTRUCTED]


@pytest.mark.slow
def test_what_is_done_is_kept_until_its_code_changes(tmp_path, monkeypatch):
    """The truth is found once; a contestant's row goes on where it was, and is made again for other attacks."""
    tmp_path = tmp_path / "cpu"
    arguments = ["truth", "--quick", "--out", str(tmp_path), *NAMES, "--contestants", "fast"]
    program.main(arguments)
    first = run_truth.read(tmp_path)
    assert [row["subject"] for row in first["truth"]] == NAMES
    seeds = [*((NAMES[0], seed) for seed in range(3)), (NAMES[1], 0), (NAMES[2], 0)]
    assert [(row["subject"], row["seed"]) for row in first["contestants"]] == seeds
    assert first["truth"][2]["verdicts"] == ["rr"] and first["contestants"][-1]["left"] == ["11"]
    exactly = first["truth"][0]
    assert set(exactly["verdicts"][0]) <= set("rf?ew") and len(exactly["how"][0]) == 4 == len(exactly["verdicts"][0])

    asked = []
    evaluate = run_truth.evaluate

    def counted(*args, **options):
        asked.append(options["protocol"])
        return evaluate(*args, **options)

    monkeypatch.setattr(run_truth, "evaluate", counted)
    monkeypatch.setattr(exact, "decide", None)
    program.main(arguments)
    assert not asked and run_truth.read(tmp_path) == first
    # a row of older code, and one that was interrupted
    changed = json.loads((tmp_path / run_truth.FILE).read_text())
    changed["contestants"][0]["code"]["attacks"][-1] += " of an older revision"
    changed["contestants"][-1]["left"] = []
    (tmp_path / run_truth.FILE).write_text(json.dumps(changed))
    program.main(arguments)
    again = run_truth.read(tmp_path)
    assert asked == ["fast", "fast"] and not run_truth.outdated(tmp_path.parent)
    assert [row["left"] for row in again["contestants"]] == [row["left"] for row in first["contestants"]]


# -- the contest against the official AutoAttack -----------------------------------------------------------------------
# The contest against the official AutoAttack: finished contests are kept, and the table says what the results say.


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


# -- models for the zoo ------------------------------------------------------------------------------------------------
# Models are packed into the zoo by a command, with a card that says what two protocols left of them.


def asked(*options):
    """The values that the command line reads."""
    parser = program.argparse.ArgumentParser()
    pack_zoo.arguments(parser)
    return parser.parse_args(list(options))


def test_a_model_is_packed_and_judged_by_both_protocols(tmp_path, monkeypatch):
    models, source = tmp_path / "models", tmp_path / "trained"
    shutil.copytree(packed.folder("digits-standard"), source)
    (source / "card.json").unlink()
    # the longer protocol takes a minute even on few images
    monkeypatch.setattr(pack_zoo, "PROTOCOLS", {"standard": 1.0, "fast": 0.5})
    chosen = asked(f"digits-standard={source}", "--images", "10", "--out", str(tmp_path / "out"))
    pack_zoo.main(chosen, models)
    folder = models / "digits-standard"
    card = read_card(folder)
    assert (folder / "model.safetensors").is_file()
    assert card.attacked["standard"].images == 10 and card.attacked["fast"].images == 5
    assert card.clean.images > 300 and card.clean.share > 0.9
    # a number of other attacks than today's is marked
    assert "†" not in "".join(pack_zoo.table([card]))
    monkeypatch.setattr(APGD, "revision", lambda self: "another")
    revisions.short.cache_clear()
    cells = pack_zoo.table([card])[4].split("|")
    assert [cell.strip().endswith("†") for cell in cells] == [False] * 5 + [True, True, False]
    monkeypatch.undo()
    revisions.short.cache_clear()
    monkeypatch.setattr(pack_zoo, "PROTOCOLS", {"standard": 1.0, "fast": 0.5})
    assert (tmp_path / "out" / "digits-standard" / "standard" / "report.html").is_file()
    # a card that is written again needs no training's folder, and takes the attacks that were done
    again = asked("digits-standard", "--images", "10", "--out", str(tmp_path / "out"))
    pack_zoo.main(again, models)
    assert read_card(folder) == card


def test_what_is_too_large_in_float32_is_stored_in_bfloat16():
    for name in packed.list():
        _, state = read_model(packed.folder(name))
        kinds = {value.dtype for value in state.values() if value.is_floating_point()}
        whole = sum(4 * value.numel() for value in state.values())
        assert kinds == {torch.bfloat16} or (kinds == {torch.float32} and whole <= pack_zoo.LARGEST), name
