"""Two predictions show whether a model draws random numbers, and calls whether it draws once for all images."""

from functools import cache, partial

import pytest
import torch
from digit_nets import digits, held_out, standard
from direct import direct
from evaluating import evaluate
from search_calls import apgd, fab_t, square, stadv
from small_models import Made
from torch import nn
from torch.nn import functional as F

from purify_fast.attacks import APGD, PGD, AttackersHead, pgd
from purify_fast.attacks.shared_draws import differ, drawn_once_per_call
from purify_fast.defences import NoisyEnsemble
from purify_fast.methods.atop import Atop
from purify_fast.methods.carso import Carso
from purify_fast.methods.diffusion import DiffusionPurifier
from purify_fast.speed.agreement import FLOAT32, apart


def scaled(scale, offset, sigma):
    """The network behind noise of a standard deviation ``sigma``, its logits scaled and moved."""
    return Made(lambda self, x: scale * (self.inner(x + sigma * torch.randn_like(x)) + offset), inner=standard())


def last_bits(scale, offset):
    """A deterministic network whose sums are added up in another order every time, as kernels on a GPU may do it."""

    def how(self, x):
        logits = scale * (self.inner(x) + offset)
        return logits + logits.abs().amax() * torch.finfo(logits.dtype).eps * torch.randint(-2, 3, logits.shape)

    return Made(how, inner=standard())


@pytest.mark.parametrize("scale", [1e-12, 1e6])
@pytest.mark.parametrize("offset", [0.0, -1e5])
def test_the_scale_of_the_logits_does_not_matter(scale, offset):
    x, y = held_out(16)
    options = {"eps": 0.1, "steps": 2, "eot_iter": 3, "n_eval": 4, "attacks": [PGD()]}
    noisy = evaluate(scaled(scale, offset, 0.3), x, y, **options)
    assert [row.n_eval for row in noisy.rows] == [4, 4, 4] and noisy.rows[1].settings["eot_iter"] == 3
    assert not noisy.rows[0].deterministic
    for still in (scaled(scale, offset, 0.0), last_bits(scale, offset)):
        found = evaluate(still, x, y, **options)
        assert [row.n_eval for row in found.rows] == [1, 1, 1] and found.rows[1].settings["eot_iter"] == 1
        assert found.rows[0].deterministic


def sometimes(where):
    """The network behind noise, which only some images get."""

    def how(self, x):
        return self.inner(x + 0.3 * where(self, x).float()[:, None, None, None] * torch.randn_like(x))

    return Made(how, inner=standard())


def off_the_grid(_, x):
    return (16 * x - (16 * x).round()).abs().flatten(1).amax(1) > 1e-3


def unsure(model, x):
    return model.inner(x).softmax(1).amax(1) < 0.99


def attacked(_, x):
    """As far from a clean image as an attack goes."""
    distance = (x[:, None] - held_out(16)[0]).abs().flatten(2).amax(2).amin(1)
    return (distance - 0.1).abs() < 1e-3


RULES = {"off the grid": off_the_grid, "unsure": unsure, "attacked": attacked}


def surest_first(n):
    x, y = held_out()
    return [part[standard()(x).softmax(1).amax(1).argsort(descending=True)][:n] for part in (x, y)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("order", ["surest first", "surest last"])
def test_a_model_that_draws_for_some_images_only_is_random(name, order, caplog):
    """A defence may detect attacked images, and predict clean images always alike."""
    x, y = held_out(16) if name == "attacked" else surest_first(48)
    x, y = (x, y) if order == "surest first" else (x.flip(0), y.flip(0))
    options = {"eps": 0.1, "steps": 5, "eot_iter": 3, "n_eval": 4, "attacks": [PGD()]}
    found = evaluate(sometimes(RULES[name]), x, y, **options)
    assert not found.rows[0].deterministic and [row.n_eval for row in found.rows] == [4, 4, 4]
    assert found.rows[1].settings["eot_iter"] == 3
    again = "two predictions of the same attacked images differ"
    assert (again in caplog.text) == (again in " ".join(found.notes)) == (name == "attacked")


def test_what_is_not_finite_is_compared_too():
    logits = torch.tensor([[torch.inf, 1.0, -2.0], [torch.nan, 0.0, 3.0], [-torch.inf, -torch.inf, -torch.inf]])
    assert not differ(logits, logits.clone()) and not differ(logits, logits * (1 + 1e-7))
    changes = [(0, 0, 5.0), (0, 0, torch.nan), (1, 0, 0.0), (1, 2, 3.1), (2, 2, torch.inf), (0, 1, 1.1)]
    for row, column, value in changes:
        other = logits.clone()
        other[row, column] = value
        assert differ(logits, other) and differ(other, logits)
    empty = torch.full((2, 3), torch.nan)
    assert not differ(empty, empty) and differ(empty, torch.zeros(2, 3))


@pytest.mark.parametrize("absent", [-10.0, -1e9, -torch.inf])
def test_a_class_that_cannot_win_hides_no_other(absent):
    logits = torch.cat([torch.randn(8, 3), torch.full((8, 1), absent)], 1)
    # An image may be refused by a class of its own.
    logits[3, 2] = 1e9
    for column in range(2):
        other = logits.clone()
        other[:, column] += 0.01
        assert differ(logits, other) and apart(logits, other, FLOAT32).tolist() == [i != 3 for i in range(8)]
    # Nothing that is added to all logits of an image decides.
    assert not differ(logits[:3], logits[:3] + 0.5) and not differ(logits, logits * (1 + 1e-7))


def test_a_masked_class_does_not_make_a_model_deterministic():
    """The label has less than half of the predictions, which all images of a call share."""

    def model(x):
        score = (x - 0.5).flatten(1).sum(1) / 4 + 0.2 * torch.randn(1)
        return torch.stack([-score, score, torch.full_like(score, -1e9)], 1)

    x, y = torch.full((40, 1, 4, 4), 0.495), torch.ones(40).long()
    clean = evaluate(model, x, y, eps=0.01, attacks=[PGD(steps=1)], n_eval=4).rows[0]
    assert not clean.deterministic and clean.n_eval == 20 and clean.images_share_draws


class Switch(nn.Module):
    """Every call draws which network answers."""

    def __init__(self, *nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x):
        return self.nets[int(torch.randint(len(self.nets), ()))](x)


class SwitchEach(Switch):
    """Every image draws which network answers it."""

    def forward(self, x):
        drawn = torch.randint(len(self.nets), (len(x),))
        return torch.stack([one(x) for one in self.nets])[drawn, torch.arange(len(x))]


class SwitchLooped(Switch):
    """As `Switch`, but draws come by a method that takes each in a call of its own."""

    def draw_logits(self, x, draws):
        return torch.stack([self(x) for _ in range(draws)])


def shared_noise(each=0.0):
    """One draw of noise for all images of a call, which differ all the same."""
    noisy = lambda self, x: self.inner(x + 0.2 * torch.randn_like(x[:1]) + each * torch.randn_like(x))  # noqa: E731
    return Made(noisy, inner=quarter())


class Samples(Switch):
    """A defence of several samples, without a method for several draws of them."""

    def sample_logits(self, x):
        return torch.stack([super(Samples, self).forward(x) for _ in range(2)], 1)

    def forward(self, x):
        return self.sample_logits(x).mean(1)


class OwnForward(NoisyEnsemble):
    """A subclass that draws in its own way; the class it comes from brings a method for several draws."""

    def __init__(self):
        super().__init__(quarter(), sigma=0.1, samples=2)

    def forward(self, x):
        return self.classifier(x + 0.2 * torch.randn_like(x[:1]))


@cache
def nets():
    """Four networks that see a quarter of the pixels each: what fools one need not fool another."""
    x, y, _, _ = digits()
    made = []
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        for i in range(4):
            seen = torch.zeros(8, 8)
            seen[i // 2 :: 2, i % 2 :: 2] = 1
            net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
            model = Made(lambda self, x: self.net(x * self.seen), net=net, seen=nn.Parameter(seen, False))
            optimizer = torch.optim.Adam(model.parameters(), 1e-2)
            for _ in range(4):
                for index in torch.randperm(len(x)).split(128):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[index]), y[index]).backward()
                    optimizer.step()
            made.append(model.eval().requires_grad_(False))
    return made


def quarter():
    return nets()[0]


@pytest.fixture(scope="module")
def batch():
    nets()
    x, y = digits()[2:]
    return x[:24], y[:24]


def test_which_models_draw_once_per_call(batch):
    x, _ = batch
    torch.manual_seed(0)
    state = torch.get_rng_state()
    head = AttackersHead(Samples(*nets()), "mean")
    once = [Switch(*nets()), shared_noise(), shared_noise(each=1e-6), lambda x: shared_noise()(x), Samples(*nets())]
    once += [head, OwnForward()]
    each = [SwitchEach(*nets()), SwitchLooped(*nets()), shared_noise(each=0.2), NoisyEnsemble(quarter(), sigma=0.1)]
    for models, expected in ((once, True), (each, False), ([quarter()], False)):
        for model in models:
            assert drawn_once_per_call(model, x, 5) is expected
            # an image alone, and a blank one in front, which some noise does not change
            assert drawn_once_per_call(model, x[:1], 5) is expected
    # of one draw, or of no images, nothing is asked, and the generators are as they were
    assert not drawn_once_per_call(once[0], x[:0], 5) and not drawn_once_per_call(once[0], x[:0], 5, 7)
    assert not drawn_once_per_call(once[0], x, 1) and torch.equal(torch.get_rng_state(), state)


class Promises(Switch):
    """A model whose class says that it draws for each image; it counts how often it is asked."""

    draws_for_each_image = True
    asked = 0

    def forward(self, x):
        self.asked += 1
        return super().forward(x)


class PromisesNothing(Promises):
    """A subclass, which may draw in another way."""


def test_a_class_that_promises_draws_for_each_image_is_not_asked(batch):
    x, _ = batch
    torch.manual_seed(0)
    promising, other = Promises(*nets()), PromisesNothing(*nets())
    assert not drawn_once_per_call(promising, x, 5) and promising.asked == 0
    assert drawn_once_per_call(other, x, 5) and other.asked > 0
    assert all(kind.draws_for_each_image for kind in (Carso, Atop, DiffusionPurifier))
    assert not NoisyEnsemble.draws_for_each_image


ATTACKS = {
    "pgd": partial(pgd, eps=0.12, steps=5, eot_iter=8),
    "apgd": partial(apgd, eps=0.12, steps=5, eot_iter=8),
    "targeted": partial(apgd, eps=0.12, steps=5, eot_iter=8, loss="dlr_targeted", n_target_classes=2),
    "fab_t": partial(fab_t, eps=0.12, steps=5, eot_iter=8, n_target_classes=2),
    "square": partial(square, eps=0.12, n_queries=20, eot_iter=8),
    "judged by draws": partial(direct, square, eps=0.12, n_queries=20, judge_draws=8),
    "stadv": partial(stadv, steps=5, eot_iter=8),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_see_it_by_themselves(batch, attack):
    """A call of several draws of one image finds the images of the looped model; the same numbers are drawn."""
    x, y = batch
    found = []
    for kind in (Switch, SwitchLooped):
        torch.manual_seed(0)
        found.append(ATTACKS[attack](kind(*nets()), x, y))
    same = (found[0] - found[1]).flatten(1).abs().amax(1) < 1e-3
    # sums over draws are rounded otherwise, which now and then turns the sign of a step
    assert same.float().mean() > 0.8 and not torch.equal(found[0], x)


def test_a_lucky_draw_is_no_success_of_all_draws(batch):
    """Images were called robust because one draw for all images had left them."""
    x, y = batch
    rows, notes = {}, {}
    for kind in (Switch, SwitchLooped, SwitchEach):
        attacks = [PGD(eot_iter=8), APGD(loss="dlr_targeted", eot_iter=8, n_target_classes=2)]
        report = evaluate(kind(*nets()), x, y, eps=0.15, attacks=attacks, steps=10, n_eval=20)
        rows[kind], notes[kind] = report.rows, [note for note in report.notes if not note.startswith("few images")]
    for one, looped in zip(rows[Switch], rows[SwitchLooped], strict=True):
        assert abs(one.mean - looped.mean) < 0.05
    # Both models draw once for all images of a call: the first for any number of draws, the second for each draw.
    assert all("have a random part in common" in note for kind in (Switch, SwitchLooped) for note in notes[kind])
    assert len(notes[Switch]) == 1 == len(notes[SwitchLooped]) and not notes[SwitchEach]


def rarely_turned(share, together=False):
    """Each image's logits are turned around in a share of its draws, or all images' together."""

    def model(x):
        z = (x.flatten(1).mean(1) - 0.5) * 20
        turned = torch.rand(1 if together else len(x), 1) < share
        return torch.stack([-z, z], 1) * torch.where(turned, -1.0, 1.0)

    return model


def test_rare_draws_of_each_image_are_not_taken_for_draws_of_a_call():
    """The copies of an image in a call were equal, because its draws rarely differ, and another call differed."""
    x = torch.rand(6, 1, 4, 4)
    for share in (0.5, 0.03):
        for images, draws, most in ((1, 20, None), (6, 20, 2), (1, 2, None)):
            mistaken = together = 0
            for seed in range(30):
                torch.manual_seed(seed)
                mistaken += drawn_once_per_call(rarely_turned(share), x[:images], draws, most)
                together += drawn_once_per_call(rarely_turned(share, together=True), x[:images], draws, most)
            assert mistaken <= 1, (share, images, draws, most)
            # eight calls show a rare draw of a call now and then only
            assert together >= {0.5: 28, 0.03: 2}[share], (share, images, draws, most)
