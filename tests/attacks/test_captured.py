"""Attacks whose step is captured, by functions that run again on their buffers: the bits of the eager loop, no wait."""

from collections.abc import Callable

import pytest
import torch
from direct import direct
from search_calls import apgd, fab_t, square, stadv
from small_models import images_and_labels
from torch import Tensor, nn

from purify_fast.attacks import GradientHealth, pgd
from purify_fast.defences import NoisyEnsemble
from purify_fast.judge.searches import engine
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed import StepGraphs

SIZES = {"linf": 0.1, "l2": 1.0, "l1": 5.0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SmallCNN(1, 5, (8, 8), 4)


@pytest.fixture(scope="module")
def batch():
    return images_and_labels(9, (1, 8, 8), 5)


@pytest.fixture
def graphs(rerun) -> StepGraphs:
    return StepGraphs("always", capture=rerun)


OPTIONS = {
    "falling step": {},
    "constant step": {"alpha": 0.05},
    "best point and health": {"keep_best": True, "loss": "dlr"},
    "draws in parts": {"eot_iter": 3, "max_forward_batch": 12, "keep_best": True},
    "no random start": {"random_start": False, "loss": "margin"},
}


@pytest.mark.parametrize("norm", SIZES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_captured_pgd_gives_the_bits_of_eager_pgd(model, batch, graphs, rerun, norm, options):
    options = {"eps": SIZES[norm], "norm": norm, "steps": 11, **options}
    healths = [GradientHealth() for _ in range(3)]
    wanted, *found = (
        direct(pgd, model, *batch, graphs=chosen, health=health, **options)
        for chosen, health in zip((None, graphs, graphs), healths, strict=True)
    )
    assert rerun.recorded == 1 and rerun.replayed == 22 and graphs.refusal is None
    assert all(torch.equal(one, wanted) for one in found) and not torch.equal(wanted, batch[0])
    counts = [[h.count(n) for n in ("gradients", "nonfinite", "zero", "images", "unmoved")] for h in healths]
    # With the loss dlr, zeros at misclassified images do not count.
    most, zeros_count = 11 * 9, options.get("loss") != "dlr"
    assert counts[1:] == counts[:1] * 2 and (counts[0][0] == most if zeros_count else 0 < counts[0][0] < most)


#: Attacks of which images leave the batch, their options and by how much the radius is divided.
LEAVING = {
    "apgd": (apgd, {"loss": "dlr_targeted", "n_target_classes": 2}, 8),
    "apgd, nothing leaves": (apgd, {"leave_when_fallen": False}, 8),
    "fab": (fab_t, {"n_target_classes": 2}, 4),
    "square": (square, {"n_queries": 300}, 8),
    "square, the mean of two draws": (square, {"n_queries": 150, "eot_iter": 2}, 8),
}


CAPTURED = [pytest.param(name, marks=pytest.mark.slow if "draws" in name else ()) for name in LEAVING]


@pytest.mark.parametrize("norm", SIZES)
@pytest.mark.parametrize("name", CAPTURED)
def test_captured_searches_give_the_bits_of_eager_ones(batch, graphs, rerun, norm, name):
    torch.manual_seed(0)
    x, model = batch[0], nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5))
    attack, options, part = LEAVING[name]
    usual = {} if attack is square else {"steps": 25, "eot_iter": 2}
    options = {"eps": SIZES[norm] / part, "norm": norm, **usual, **options}
    y = model(x).argmax(1)
    wanted, found = (direct(attack, model, x, y, graphs=chosen, **options) for chosen in (None, graphs))
    assert torch.equal(wanted, found) and not torch.equal(found, x)
    # the first steps are launched, since the batch may shrink after any of them
    assert rerun.recorded >= 1 and graphs.refusal is None and (rerun.replayed >= 15 or norm == "l1" or name == "apgd")


class Sizes(nn.Module):
    """Notes the sizes of its batches; about half of the images fall at a radius of 0.05."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5))
        self.seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(len(x))
        return self.layers(x)


@pytest.mark.parametrize("norm", [pytest.param(norm, marks=[pytest.mark.slow] * (norm != "linf")) for norm in SIZES])
def test_few_graphs_serve_a_whole_search_by_squares(graphs, rerun, monkeypatch, norm):
    """Rows that fill a batch change no result, and a graph serves for all edges and blocks of random numbers."""
    x, model = torch.rand(75, 1, 8, 8, generator=torch.Generator().manual_seed(2)), Sizes()
    options = {"eps": SIZES[norm] / 3, "norm": norm, "n_queries": 700, "restarts": 2}
    y = model(x).argmax(1)
    wanted = square(model, x, y, **options)
    left = int((model(wanted).argmax(1) == y).sum())
    assert 0 < left < 60, left
    monkeypatch.setattr(engine, "takes_every_size", lambda device: False)
    model.seen.clear()
    torch.testing.assert_close(direct(square, model, x, y, graphs=graphs, **options), wanted, rtol=0, atol=0)
    # 16, 32, 64 and 128 rows, times the number of proposals in a round
    assert model.seen <= {75} | {size * together for size in (16, 32, 64, 128) for together in (1, 2, 4)}
    sizes = {size for size in (16, 32, 64, 128) if size in model.seen}
    # three numbers of proposals
    assert 3 < rerun.recorded <= 3 * len(sizes) and graphs.refusal is None


@pytest.mark.parametrize("give_up", [False, True])
def test_captured_fab_counts_the_same_faults(batch, graphs, give_up):
    """Rows without a gradient are counted as often as in the eager loop, also those that have left."""
    torch.manual_seed(0)
    x, model = torch.rand(40, 1, 8, 8), nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 5))
    with torch.no_grad():
        model[1].bias -= 0.4
    y, healths = model(x).argmax(1), [GradientHealth(), GradientHealth()]
    options = {"eps": 0.05, "steps": 50, "n_target_classes": 2, "give_up": give_up}
    wanted, found = (
        direct(fab_t, model, x, y, graphs=chosen, health=health, **options)
        for chosen, health in zip((None, graphs), healths, strict=True)
    )
    counts = [[health.count(name) for name in ("gradients", "nonfinite", "zero")] for health in healths]
    assert torch.equal(wanted, found) and counts[0] == counts[1] and 0 < counts[0][2] < counts[0][0]


@pytest.mark.parametrize("attack", [square, fab_t], ids=["square", "fab"])
def test_captured_searches_of_a_random_model(model, graphs, rerun, attack):
    """Lucky draws are judged again by the model itself, and what it says reaches the captured state."""
    x, defence = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(3)), NoisyEnsemble(model, 0.2, 1)
    amount, found = {"n_queries": 90} if attack is square else {"steps": 30, "n_target_classes": 2}, []
    y = model(x).argmax(1)
    for chosen in (None, graphs):
        torch.manual_seed(4)
        found.append(direct(attack, defence, x, y, eps=0.03, eot_iter=2, judge_draws=6, graphs=chosen, **amount))
    assert torch.equal(*found) and rerun.replayed > 20 and graphs.refusal is None


class Lucky(nn.Module):
    """A model of two classes and a border at some mean, which errs in one of the calls that ``counts`` accepts."""

    def __init__(self, border: float, call: int, by: float, counts: Callable[[Tensor], bool]):
        super().__init__()
        self.border, self.left, self.by, self.counts = border, call, by, counts

    def forward(self, x: Tensor) -> Tensor:
        counts = self.counts(x)
        self.left -= counts
        lucky = self.by if counts and self.left == 0 else 0.0
        return torch.stack([self.border - x.mean((1, 2, 3)) - lucky, torch.zeros(len(x))], 1)


def test_a_lucky_margin_is_forgotten_by_the_loop():
    """The first points have a margin that is too high, and block all proposals until the margin is drawn again."""
    x, y = torch.full((4, 1, 8, 8), 0.3), torch.zeros(4, dtype=torch.int64)
    # The first call about changed images is about the first points.
    once, before, after = (
        square(Lucky(0.9, 1, 0.3, lambda z: bool(z.std() > 1e-3)), x, y, eps=0.1, eot_iter=2, n_queries=n)
        for n in (1, 9, 60)
    )
    assert torch.equal(once, before) and (before != after).flatten(1).any(1).all()


def test_a_point_that_the_model_does_not_confirm_is_forgotten_by_the_loop():
    """The image itself seems to lie across the border, and would be nearer than every other point."""
    x, y = torch.full((4, 1, 8, 8), 0.45), torch.zeros(4, dtype=torch.int64)
    # The distances to the borders take the first gradient.
    model = Lucky(0.5, 2, 1.0, lambda z: z.requires_grad)
    found = fab_t(model, x, y, eps=0.1, steps=20)
    assert model.left < 0 and (model(found).argmax(1) == 1).all()


def test_captured_stadv_gives_the_bits_of_eager_stadv(model, batch, graphs, rerun):
    wanted, found = (direct(stadv, model, *batch, steps=20, keep_best=True, graphs=chosen) for chosen in (None, graphs))
    assert torch.equal(wanted, found) and not torch.equal(found, batch[0]) and rerun.replayed == 20


def test_a_random_defence_draws_as_without_graphs(model, batch, graphs, rerun):
    x, y = batch
    defence = NoisyEnsemble(model, 0.1, 2)

    def attack(chosen, ids, seed):
        torch.manual_seed(seed)
        with defence.noise_ids(ids):
            found = direct(pgd, defence, x, y, eps=0.1, steps=20, eot_iter=1, graphs=chosen)
        return found, torch.rand(1)

    for ids in (torch.arange(9), torch.arange(9) + 100, torch.arange(9).flip(0)):
        for seed in (1, 2):
            (wanted, after), (found, then) = attack(None, ids, seed), attack(graphs, ids, seed)
            assert torch.equal(wanted, found) and torch.equal(after, then)
    assert rerun.recorded == 1
    assert not torch.equal(attack(None, torch.arange(9), 1)[0], attack(None, torch.arange(9) + 100, 1)[0])
    with defence.fixed_noise(3):
        fixed = [direct(pgd, defence, x, y, eps=0.1, steps=20, graphs=chosen) for chosen in (None, graphs)]
    with defence.fixed_noise(4):
        other = [direct(pgd, defence, x, y, eps=0.1, steps=20, graphs=chosen) for chosen in (None, graphs)]
    assert torch.equal(*fixed) and torch.equal(*other) and not torch.equal(fixed[0], other[0])
    assert rerun.recorded == 2, "another mode is another graph, another seed is not"
