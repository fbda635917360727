"""The evaluations of the authors: their models, faults and all, their attacks, and the rows with their sources. The
tests of rebuilt defences and of the papers' questions follow."""

import dataclasses
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from denoisers import defence, images
from small_models import Linear, Made
from torch import nn
from torch.nn import functional as F

from benchmarks import __main__ as program
from benchmarks.robustness.authors import Evaluation, authors_evaluations, diffusion_release as release, rows_of
from benchmarks.robustness.authors.atop_release import ReleasedEvaluation
from benchmarks.robustness.broken import adaptive, entry, run_broken as tables
from benchmarks.robustness.studies import papers_questions as study
from purify_fast.attacks import BpdaModel, OriginalAutoAttack
from purify_fast.data import load_dataset, to_float
from purify_fast.defences import WithAggregation, WithFixedNoise
from purify_fast.methods.atop import Atop
from purify_fast.methods.carso import Carso
from purify_fast.methods.diffusion import Process, Schedule
from purify_fast.models.classifiers import SmallCNN

SHAPE = (1, 8, 8)
VP = Schedule("vp")
IMAGE = (3, 8, 8)
ROWS = [
    "as evaluate.ipynb (glin2022/atop), without its faults: one fixed draw",
    "as evaluate.ipynb (glin2022/atop), with its faults, batches 1 to 4",
    "as evaluate.ipynb (glin2022/atop), with its faults, from batch 5 on",
    'as the training log of glin2022/atop, column "BPDA": PGD-20 on the classifier alone (not adaptive)',
    'as tables 7 and 8 of AToP\'s paper, "BPDA": PGD-1000 on the classifier alone (not adaptive)',
]


def given():
    """A purifier whose last stage returns what it is given, and a classifier that shows what it gets."""

    def how(self, image, mask=None):
        return image.flatten(1) if mask is None else (0 * image, image * self.gain)

    return Made(how, gain=nn.Parameter(torch.ones(())))


def test_the_released_model_has_no_noise_another_range_and_nothing_hidden_from_the_fifth_batch_on():
    made = Atop(given(), given(), IMAGE, block=2, samples=3)
    x = torch.rand(4, *IMAGE)
    with torch.no_grad():
        for batch in (4, 63):
            # the generator is given x where it was trained on 2x - 1
            assert torch.equal(ReleasedEvaluation(made, batch)(x), ((x + 1) / 2).flatten(1))
        for batch in (0, 3):
            model = ReleasedEvaluation(made, batch)
            shown, again = (model(x).unflatten(1, IMAGE) for _ in range(2))
            hidden = (shown == 0.5).all(1)
            # one mask for the batch, of whole blocks, a quarter of them, drawn anew in each prediction
            assert (hidden == hidden[:1]).all() and hidden[0].sum() == 16
            assert hidden[0].unfold(0, 2, 2).unfold(1, 2, 2).flatten(2).float().std(2).max() == 0
            assert not torch.equal(shown, again)
            expected = ((x + 1) / 2)[~hidden[:, None].expand_as(x)]
            assert torch.equal(shown[~hidden[:, None].expand_as(x)], expected)


def test_the_rows_are_named_after_their_sources():
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    # noise and blocks decide next to nothing, so that one image is enough
    made = Atop(Linear(192, classes=4), given(), IMAGE, block=2, sigma=0.01, samples=2).eval()
    x = torch.rand(3, *IMAGE)
    evaluations = authors_evaluations(made, 0.3)
    with torch.no_grad():
        y = evaluations[0].model(x).argmax(1)
    rows = rows_of(evaluations, x, y, eps=0.3)
    # In the batches with its faults, the released code draws once for all images of a batch.
    assert [row.attack for row in rows] == ROWS and [row.n_eval for row in rows] == [1, 20, 1, 1, 1]
    # As in every evaluation, images that the authors' model misclassifies are not attacked.
    assert rows[0].attacked == 3 and all(row.accuracy <= row.attacked / 3 for row in rows)
    assert [attack.max_images for _, attack in evaluations] == [None, 32, None, None, None]
    assert [row.settings["steps"] for row in rows] == [100, 10, 10, 20, 1000]
    assert [row.settings["eot_iter"] for row in rows] == [1] * 5
    assert isinstance(evaluations[0].model, WithFixedNoise) and rows[0].accuracy == 0
    # One draw of the whole defence judges what was found on its classifier.
    assert [attack.through is made.classifier for _, attack in evaluations] == [False] * 3 + [True] * 2
    assert [model.samples for model, _ in evaluations[3:]] == [1, 1] and made.samples == 2


def test_the_published_output_is_attacked_and_judges():
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    classifier = SmallCNN(1, image_size=(16, 16), width=2)
    with torch.no_grad():
        # sure enough for infinities in the published output
        classifier.head.weight.mul_(1000)
    sizes = {"cond_dim": 4, "latent_dim": 2, "samples": 3, "decoder_width": 2}
    made = Carso(classifier, ["conv2"], (1, 16, 16), **sizes).eval()
    x = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        assert not WithAggregation(made, "peel_reference")(x).isfinite().all()
        y = made(x).argmax(1)
    ((model, spec),) = authors_evaluations(made, 0.05)
    assert spec.label == "as src/eval_a.py (emaballarin/CARSO): AutoAttack rand through PeeL, K = 3"
    assert spec.attack == OriginalAutoAttack(version="rand") and spec.through is None
    # fewer steps and draws than its 100 and 20, which take a minute
    short = replace(spec, attack=OriginalAutoAttack(version="rand", steps=5, eot_iter=2))
    (row,) = rows_of([Evaluation(model, short)], x, y, eps=0.05)
    # nothing can be found through NaN, and the row says so
    assert row.accuracy == 1 and row.n_eval == 1 and not row.reliable and row.health["nonfinite"] > 0
    with torch.no_grad(), made.fixed_noise(0):
        assert torch.equal(model(x), WithAggregation(made, "peel_reference")(x))


def gradient(model, x, seed=1):
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    return torch.autograd.grad(model(leaf).square().sum(), leaf)[0]


def test_the_adjoint_is_the_products_of_its_formula():
    """Each of two steps has the drift where a step of the SDE ended: beta(t) and alpha_bar(t) of Song et al."""
    share, end = 0.01, 1e-5
    denoiser = Made(lambda self, x, t: self.share * x, share=nn.Parameter(torch.tensor(share)))
    made = defence(SHAPE, denoiser, Process(VP, solver="vp_sde", t_star=0.2, steps=2, clip=False)).double()
    made.classifier = nn.Flatten()
    x = images(2, SHAPE, torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(release.AdjointGradient(made)(x).sum(), x)

    def kept(t):
        return math.exp(-0.1 * t - 9.95 * t * t)

    wanted = math.sqrt(kept(0.2))
    for t, following in ((0.1, end), (end, 2 * end - 0.1)):
        rate = (0.1 + 19.9 * t) * (t - following)
        wanted *= 1 + rate / 2 - rate * share / math.sqrt(1 - kept(t))
    torch.testing.assert_close(found, torch.full_like(x, wanted))


def test_gdmp_is_judged_by_the_sum_of_ten_purifications_and_attacked_through_one():
    made, x = defence(SHAPE, process=Process(steps=2), samples=3, aggregation="vote"), images(2, SHAPE)
    (model, alone), (same, straight) = authors_evaluations(made, 0.1)
    ten = defence(SHAPE, process=Process(steps=2), samples=10, aggregation="mean")
    assert model is same and alone.through is model.classifier
    torch.manual_seed(1)
    logits = model(x)
    torch.manual_seed(1)
    assert torch.equal(logits, ten(x))
    attacked = straight.through
    assert isinstance(attacked, BpdaModel)
    one = defence(SHAPE, process=Process(steps=2))
    torch.manual_seed(1)
    followed = gradient(attacked, x)
    torch.manual_seed(1)
    assert torch.equal(followed, gradient(BpdaModel.of(one), x)) and straight.attack.eot_iter == 15


def test_the_rows_of_its_authors():
    sde = defence(SHAPE, process=Process(VP, solver="vp_sde", t_star=0.1, steps=2), samples=3)
    found = authors_evaluations(sde, 8 / 255)
    assert [spec.label for _, spec in found] == [release.DIFFPURE, release.CLASSIFIER_ROW, release.STRAIGHT]
    rand, alone, straight = (spec.attack for _, spec in found)
    assert isinstance(rand, OriginalAutoAttack) and rand.version == "rand"
    assert isinstance(found[0].model, release.AdjointGradient)
    assert (alone.steps, alone.eot_iter, straight.steps, straight.eot_iter) == (10, 1, 40, 15)
    assert alone.alpha == straight.alpha == 2 / 255 and found[0].model.defence.samples == 1 and sde.samples == 3
    ddpm = defence(SHAPE, process=Process(steps=2))
    x, evaluations = images(2, SHAPE), authors_evaluations(ddpm, 0.1)
    rows = rows_of(evaluations, x, ddpm.classifier(x).argmax(1), eps=0.1)
    assert [row.attack for row in rows] == [release.CLASSIFIER_ROW, release.STRAIGHT]
    assert [row.n_eval for row in rows] == [1, 1]


# -- rebuilt defences --------------------------------------------------------------------------------------------------
# The rebuilt defences: each one predicts, and what an adaptive attack follows has gradients; the score counts.

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


TRUTHS = [
    ("1100", [], "found"),
    ("1110", [], "missed"),
    ("1110", ["missed images"], "flagged"),
    ("1000", [], "found"),
    # as many as the truth, of other images
    ("0011", [], "found"),
    # attacked on the first two only, both of which the adaptive attack left
    ("11", [], "found"),
]


@pytest.mark.parametrize(("robust", "alarms", "says"), TRUTHS)
def test_the_truth_is_the_adaptive_attack_alone(robust, alarms, says):
    """The rows of other judges do not change it; `found` is within two points of it, or below."""
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


# -- the papers' questions ---------------------------------------------------------------------------------------------
# The study of the papers' questions keeps its rows, measures none twice, and its tables say what the rows say.


def rows_of_study(folder):
    return json.loads((folder / study.FILE).read_text())


@pytest.mark.slow
def test_a_quick_run_keeps_its_rows_and_goes_on(tmp_path, capsys, forking):
    words, options = ["study", "papers_questions"], ["--quick", "--out", str(tmp_path / "studies")]
    program.main([*words, "aggregation", "end_to_end", *options])
    first, said = rows_of_study(tmp_path / "studies"), capsys.readouterr().out
    assert [row["part"] for row in first] == ["aggregation"] * 2 + ["end_to_end"] * 2
    # The classifier alone hands all of its attacked images to the defence, in five predictions.
    alone = first[2]["numbers"]["classifier alone"]
    assert len(alone) == 5 and {len(draw) for draw in alone} == {10}
    program.main([*words, "arrest", "aggregation", *options])
    again = rows_of_study(tmp_path / "studies")
    assert again[:4] == first and [row["seed"] for row in again[4:]] == [0, 1, 0, 1]
    assert len(again[4]["numbers"]["drift"]) == 10 and "aggregation: " not in capsys.readouterr().out
    right = np.array([list(map(int, draw)) for draw in alone]).mean()
    assert f" {100 * right:.1f} ± " in said
