"""AToP as its authors evaluate it: the model of evaluate.ipynb, faults and all, and the rows with their sources."""

import pytest
import torch
from evaluating import evaluate
from small_models import Linear, Made
from torch import nn

from purify_fast.evaluation.request.published import authors_attacks
from purify_fast.evaluation.request.published.atop_release import ReleasedEvaluation
from purify_fast.methods.atop import Atop

SHAPE = (3, 8, 8)
ROWS = [
    "as evaluate.ipynb (glin2022/atop), without its faults: one fixed draw",
    "as evaluate.ipynb (glin2022/atop), with its faults, batches 1 to 4",
    "as evaluate.ipynb (glin2022/atop), with its faults, from batch 5 on",
    'as the training log of glin2022/atop, column "BPDA": PGD-20 on the classifier alone (not adaptive)',
    'as tables 7 and 8 of AToP\'s paper, "BPDA": PGD-1000 on the classifier alone (not adaptive)',
]


def given():
    """A purifier that returns what it is given, and a classifier that shows what it gets."""
    how = lambda self, image, mask=None: image.flatten(1) if mask is None else image * self.gain  # noqa: E731
    return Made(how, gain=nn.Parameter(torch.ones(())))


def test_the_released_model_has_no_noise_another_range_and_nothing_hidden_from_the_fifth_batch_on():
    defence = Atop(given(), given(), SHAPE, block=2, samples=3)
    x = torch.rand(4, *SHAPE)
    with torch.no_grad():
        for batch in (4, 63):
            # the generator is given x where it was trained on 2x - 1
            assert torch.equal(ReleasedEvaluation(defence, batch)(x), ((x + 1) / 2).flatten(1))
        for batch in (0, 3):
            model = ReleasedEvaluation(defence, batch)
            shown, again = (model(x).unflatten(1, SHAPE) for _ in range(2))
            hidden = (shown == 0.5).all(1)
            # one mask for the batch, of whole blocks, a quarter of them, drawn anew in each prediction
            assert (hidden == hidden[:1]).all() and hidden[0].sum() == 16
            assert hidden[0].unfold(0, 2, 2).unfold(1, 2, 2).flatten(2).float().std(2).max() == 0
            assert not torch.equal(shown, again)
            expected = ((x + 1) / 2)[~hidden[:, None].expand_as(x)]
            assert torch.equal(shown[~hidden[:, None].expand_as(x)], expected)


def test_a_gradient_goes_through_generator_and_classifier():
    defence = Atop(given(), given(), SHAPE, block=2)
    x = torch.rand(2, *SHAPE, requires_grad=True)
    for batch, seen in ((4, 1.0), (0, 0.75)):
        (gradient,) = torch.autograd.grad(ReleasedEvaluation(defence, batch)(x).sum(), x)
        assert gradient.unique().tolist() in ([0.5], [0.0, 0.5]) and (gradient > 0).float().mean() == seen


def test_the_rows_are_named_after_their_sources():
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    # noise and blocks decide next to nothing, so that one image is enough
    defence = Atop(Linear(192, classes=4), given(), SHAPE, block=2, sigma=0.01, samples=2).eval()
    x = torch.rand(3, *SHAPE)
    with torch.no_grad():
        y = defence(x).argmax(1)
    report = evaluate(defence, x, y, eps=0.3, protocol="authors", progress=False, n_eval=2)
    assert report.attacks == ["clean", "clean, fixed noise", *ROWS] and report.headlines == {}
    for row in report.rows[2:]:
        assert row.kind == "authors" and row.n_eval == 1 and row.attacked == 3
    settings = [report.row(name).settings for name in ROWS]
    assert [spec.max_images for spec in authors_attacks(defence, 0.3)] == [None, 32, None, None, None]
    assert [told["steps"] for told in settings] == [100, 10, 10, 20, 1000]
    assert [report.row(name).settings["eot_iter"] for name in ROWS] == [1] * 5
    assert report.row(ROWS[0]).variant == "fixed" and report.row(ROWS[0]).accuracy == 0
    assert all("classifier alone" in told["target"] for told in settings[3:])
