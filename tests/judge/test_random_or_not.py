"""Two predictions show whether a model draws random numbers, and calls whether it draws once for all images. The
tests of chance follow."""

import math
import os
from functools import cache, partial

import numpy as np
import pytest
import torch
from digit_nets import digits, held_out, standard
from direct import direct
from evaluating import evaluate
from search_calls import apgd, fab_t, square, stadv
from small_models import Made
from torch import nn
from torch.nn import functional as F

from purify_fast.attacks import APGD, PGD, AttackersHead, Square, pgd
from purify_fast.attacks.base import ThreatModel
from purify_fast.attacks.shared_draws import differ, drawn_once_per_call
from purify_fast.autoattack import AutoAttack
from purify_fast.defences import MajorityVote, NoisyEnsemble
from purify_fast.evaluation import AttackSpec, as_attack
from purify_fast.judge.request.deadline import Subject
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


# -- chance is no attack -----------------------------------------------------------------------------------------------
# Chance is no attack: the numbers of a random model are those of its draws, whose exact values are known.

#: The number of evaluations in a mean.
SEEDS = int(os.environ.get("CHANCE_SEEDS", 60))


def coin(p, classes):
    """Right with probability p in every draw, and otherwise any wrong class, whatever was done to the image."""

    def how(self, x):
        label = (x.flatten(1).mean(1) * classes).floor().clamp(0, classes - 1).long()
        turned = torch.randint(1, classes, (len(x),)) * (torch.rand(len(x)) >= p)
        logits = nn.functional.one_hot((label + turned) % classes, classes).float()
        # Attacks have gradients to follow, which lead nowhere.
        return 5 * logits + 0.01 * x.flatten(1)[:, :classes]

    return Made(how)


def images(classes, n):
    y = torch.arange(n) % classes
    return ((y + 0.5) / classes)[:, None, None, None].expand(-1, 1, 4, 4).contiguous(), y


def idle(model, x, y):
    return x


def votes(p, classes, n, rounds=200_000):
    """The chance that the majority of n draws is right; between equal counts the mean probabilities decide evenly."""
    generator = np.random.default_rng(0)
    counts = generator.multinomial(n, [p, *np.full(classes - 1, (1 - p) / (classes - 1))], rounds)
    top = counts.max(1, keepdims=True)
    return float(((counts[:, 0] == top[:, 0]) / (counts == top).sum(1)).mean())


def exact(p, classes, predict, n):
    """The exact values of a row's accuracy and of one draw."""
    if predict == "votes":
        right = votes(p, classes, n)
        return right, right
    return p**n, p


def judged(p, classes, predict, n):
    """The model, and the options of its evaluation; "votes": the model is a majority vote, and is judged once."""
    if predict == "votes":
        return MajorityVote(coin(p, classes), n), {"n_eval": 1}
    return coin(p, classes), {"n_eval": n, "predict": predict}


def check(report, p, classes, predict, n, seeds=1):
    """Every row is within three standard errors of the exact value."""
    whole, one = exact(p, classes, predict, n)
    for row in report.rows:
        size = row.n * seeds
        for value, expected, draws in ((row.accuracy, whole, 1), (row.mean, one, row.n_eval)):
            error = math.sqrt(max(expected * (1 - expected), 1 / size) / (size * draws))
            assert abs(value - expected) < 4.5 * error, (row.attack, value, expected, error)


@pytest.mark.slow
@pytest.mark.parametrize("predict", [None, "worst_of", "votes"])
@pytest.mark.parametrize("protocol", ["fast", "standard", "rand", "strong"])
def test_an_attack_that_changes_nothing_changes_no_number(protocol, predict):
    x, y = images(4, 240)
    model, options = judged(0.7, 4, predict, 5)
    options |= {"steps": 3, "eot_iter": 2, "probes": True, "max_forward_batch": 4096}
    check(evaluate(model, x, y, protocol=protocol, eps=1e-3, **options), 0.7, 4, predict, 5)


CHANCES = [(0.7, None, 5), (0.9, "worst_of", 5), (0.3, None, 1), (0.6, "votes", 5)]


@pytest.mark.slow
@pytest.mark.parametrize(("p", "predict", "n"), CHANCES)
def test_over_many_seeds(p, predict, n):
    """The mean over many evaluations, which shows a bias that a single evaluation hides."""
    x, y = images(3, 40)
    attacks = [AttackSpec(as_attack(idle, name=f"idle {i}"), survivors_only=i % 2 == 1) for i in range(8)]
    model, options = judged(p, 3, predict, n)
    reports = [evaluate(model, x, y, seed=seed, eps=1e-3, attacks=attacks, **options) for seed in range(SEEDS)]
    whole, one = exact(p, 3, predict, n)
    for name in ("clean", "idle 0", "idle 7", "worst"):
        rows = [report.row(name) for report in reports]
        for values, expected in (([row.accuracy for row in rows], whole), ([row.mean for row in rows], one)):
            assert abs(np.mean(values) - expected) < 3.5 * np.std(values) / math.sqrt(SEEDS) + 1e-9, (name, expected)
        # the standard errors are those of the numbers' own spread
        assert 0.8 < np.mean([row.mean_error for row in rows]) / np.std([row.mean for row in rows]) < 1.25
    assert abs(np.mean([report.headline.accuracy for report in reports]) - whole) < 0.03


@pytest.mark.parametrize("protocol", ["fast", pytest.param("strong", marks=pytest.mark.slow)])
def test_noise_before_a_linear_classifier(protocol):
    """The best attack moves each pixel by eps, so the normal distribution gives the accuracy of one draw."""
    size, eps, sigma, n = 16, 0.02, 0.5, 240
    generator = torch.Generator().manual_seed(0)
    offsets = 0.05 * torch.rand(n, generator=generator)
    y = torch.arange(n) % 2
    x = (0.5 + offsets * (2 * y - 1))[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    options = {"eps": eps, "protocol": protocol, "steps": 12, "n_eval": 5, "eot_iter": 4}

    def noisy(x):
        """Class 1 if the sum of the pixels, with noise of standard deviation sigma, is above half of all."""
        score = x.flatten(1).sum(1) - size / 2 + sigma * torch.randn(len(x))
        return torch.stack([-score, score], 1)

    report = evaluate(noisy, x, y, **options)

    def chance(distance):
        return torch.special.ndtr(size * distance / sigma).numpy().astype(float)

    for row, each in ((report.row("clean"), chance(offsets)), (report.row("worst"), chance(offsets - eps))):
        one, every = each.mean(), (each**5).mean()
        assert abs(row.mean - one) < 3.5 * row.mean_error, (row.attack, row.mean, one)
        assert abs(row.accuracy - every) < 3.5 * math.sqrt(every * (1 - every) / n), (row.attack, row.accuracy, every)


@pytest.mark.parametrize("version", ["rand", "standard"])
def test_the_drop_in_autoattack_prints_other_draws(version, capsys):
    x, y = images(4, 400)
    adversary = AutoAttack(coin(0.7, 4), eps=1e-3, version=version, seed=1)
    for attack in (adversary.apgd, adversary.apgd_targeted):
        attack.n_iter = 2
    adversary.fab.n_iter, adversary.square.n_queries = 2, 5
    adversary.run_standard_evaluation(x, y)
    lines = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line]
    printed = [float(line.split(":")[1].split("%")[0]) for line in lines]
    draws = 20 if version == "rand" else 5
    assert len(printed) == (4 if version == "rand" else 6)
    assert all(abs(value - 70) < 350 * math.sqrt(0.21 / (400 * draws)) for value in printed), printed


@pytest.mark.parametrize("predict", ["worst_of", "votes"])
def test_every_image_keeps_its_draws_wherever_the_attack_is_not(predict):
    """Attacks on the first or the nearest images leave the others at their clean images, with all draws."""
    x, y = images(2, 300)
    model, options = judged(0.7, 2, predict, 5)
    attacks = [AttackSpec(PGD(steps=2), max_images=50), AttackSpec(APGD(steps=2), nearest=10, survivors_only=True)]
    attacks.append(AttackSpec(Square(n_queries=3), survivors_only=True))
    report = evaluate(model, x, y, eps=1e-3, attacks=attacks, **options)
    assert [row.n for row in report.rows] == [300, 50, 300, 300, 300, 50]
    check(report, 0.7, 2, predict, 5)


N = 5


def test_a_step_averages_over_the_draws_that_were_asked_for_in_votes():
    seen = []

    def noisy(x):
        seen.append(len(x))
        return torch.stack([x.flatten(1).mean(1), 0 * x.flatten(1)[:, 0]], 1) + 0.01 * torch.randn(len(x), 2)

    x, y = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    counts = []
    for steps in (1, 11):
        seen.clear()
        evaluate(MajorityVote(noisy, N), x, y, eps=0.01, attacks=[PGD(steps=steps)], eot_iter=20, n_eval=1)
        counts.append(sum(seen))
    assert counts[1] - counts[0] == 10 * 20


def test_a_vote_decides_by_its_count_and_has_the_gradient_of_the_mean_probabilities():
    x = torch.zeros(5, 1, 1, 1, requires_grad=True)
    # most votes, against the mean probability; a tie, which that decides; single infinities; draws that name no class
    inf = torch.inf
    draws = torch.tensor(
        [
            [[1.0, 0, 0], [1, 0, 0], [0, 50, 0]],
            [[0, 0, 2], [0, 1, 0], [0, 1, 2]],
            [[inf, -inf, -inf], [0, 5, inf], [-inf, -inf, inf]],
            [[1, 0, 0], [torch.nan, 0, 0], [1, 0, 0]],
            [[1, 0, 0], [inf, inf, 0], [1, 0, 0]],
        ]
    )
    scripted = iter(draws.unbind(1))
    logits = MajorityVote(lambda z: next(scripted) * (1 + z.flatten(1)), 3)(x)
    assert logits[:3].argmax(1).tolist() == [0, 2, 2] and logits.isnan().any(1).tolist() == [False] * 3 + [True] * 2
    (slope,) = torch.autograd.grad(logits[0, 0], x)
    z = torch.zeros((), requires_grad=True)
    mean = (draws[0] * (1 + z)).softmax(1).mean(0).log()[0]
    assert torch.isclose(slope[0].sum(), torch.autograd.grad(mean, z)[0])


def test_a_vote_needs_a_draw_and_of_a_deterministic_model_predicts_once():
    with pytest.raises(ValueError, match="draws"):
        MajorityVote(coin(0.8, 2), 0)
    x, y = held_out(8)
    models = MajorityVote(standard(), 3), standard()
    vote, alone = (evaluate(model, x, y, eps=0.1, attacks=[PGD(steps=3)]) for model in models)
    assert [row.robust.tolist() for row in vote.rows] == [row.robust.tolist() for row in alone.rows]
    assert vote.row("clean").deterministic and vote.row("clean").n_eval == 1


def test_a_vote_is_attacked_through_the_surrogates_of_its_model():
    x, y = held_out(8)
    model = NoisyEnsemble(standard(), 0.2, 2)
    subjects = [Subject(each, x, y, batch_size=8, n_eval=1, seed=0) for each in (model, MajorityVote(model, N))]
    ball = ThreatModel("linf", 0.1)
    alone, vote = ([name for name, _ in subject.surrogates(ball)[0]] for subject in subjects)
    assert alone == vote and "a copy without noise" in vote and all(subject.is_random for subject in subjects)


def test_votes_that_agree_do_not_hide_the_draws():
    """All votes of a sure class agree, although the draws differ."""
    x, y = torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.int64)
    model = MajorityVote(lambda x: torch.tensor([[60.0, 0.0]]) + torch.rand(len(x), 2), 3)
    assert Subject(model, x, y, batch_size=4, n_eval=1, seed=0).is_random
