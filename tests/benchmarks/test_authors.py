"""The evaluations of the authors: their models, faults and all, their attacks, and the rows with their sources."""

import math
from dataclasses import replace

import pytest
import torch
from denoisers import defence, images
from small_models import Linear, Made
from torch import nn

from benchmarks.robustness.authors import Evaluation, authors_evaluations, diffusion_release as release, rows_of
from benchmarks.robustness.authors.atop_release import ReleasedEvaluation
from purify_fast.attacks import BpdaModel, OriginalAutoAttack
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
    """Of two steps, each with the drift where a step of the SDE ended: beta(t) and alpha_bar(t) of Song et al."""
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
    assert alone.alpha == straight.alpha == 2 / 255
    assert found[0].model.defence.samples == 1 and sde.samples == 3
    ddpm = defence(SHAPE, process=Process(steps=2))
    x, evaluations = images(2, SHAPE), authors_evaluations(ddpm, 0.1)
    rows = rows_of(evaluations, x, ddpm.classifier(x).argmax(1), eps=0.1)
    assert [row.attack for row in rows] == [release.CLASSIFIER_ROW, release.STRAIGHT]
    assert [row.n_eval for row in rows] == [1, 1]
