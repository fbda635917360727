"""Chance is no attack: the numbers of a random model are those of its draws, whose exact values are known."""

import math
import os

import numpy as np
import pytest
import torch
from digit_nets import held_out, standard
from evaluating import evaluate
from small_models import Made
from torch import nn

from purify_fast.attacks import APGD, PGD, Square
from purify_fast.attacks.base import ThreatModel
from purify_fast.autoattack import AutoAttack
from purify_fast.defences import MajorityVote, NoisyEnsemble
from purify_fast.evaluation import AttackSpec, as_attack
from purify_fast.judge.request.deadline import Subject

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
    wrong = np.full(classes - 1, (1 - p) / (classes - 1))
    counts = generator.multinomial(n, [p, *wrong], rounds)
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
    printed = [
        float(line.split(":")[1].split("%")[0]) for line in capsys.readouterr().out.splitlines() if "accuracy" in line
    ]
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
