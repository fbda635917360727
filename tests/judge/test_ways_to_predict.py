"""The worst of several draws of a random model, and their majority."""

import math

import pytest
import torch
from digit_nets import digits, standard
from evaluating import evaluate

from purify_fast.attacks import APGD, PGD
from purify_fast.defences import MajorityVote, NoisyEnsemble
from purify_fast.evaluation import as_attack

P, N, COUNT = 0.2, 5, 3000
RIGHT = {
    "worst_of": 1 - P,
    "votes": sum(math.comb(N, k) * (1 - P) ** k * P ** (N - k) for k in range(N // 2 + 1, N + 1)),
}


def coin(x):
    """Class 0, and in a share P of the draws of each image class 1, however sure."""
    wrong = torch.rand(len(x)) < P
    return torch.stack([(~wrong).float(), wrong * (1 + 9 * torch.rand(len(x)))], 1) + 0 * x.flatten(1)[:, :1]


@pytest.mark.parametrize("predict", RIGHT)
def test_closed_forms(predict):
    seen = []

    def idle(model, x, y):
        seen.append(float((model(x).argmax(1) == y).float().mean()))
        return x

    x, y = torch.full((COUNT, 1, 2, 2), 0.5), torch.zeros(COUNT, dtype=torch.int64)
    attacks, options = [as_attack(idle, name="idle")], {"eps": 0.1, "batch_size": COUNT}
    report = evaluate(coin, x, y, attacks=attacks, predict=predict, n_eval=N, **options)
    once, clean, row = RIGHT[predict], *report.rows[:2]
    # every image keeps its draws, whether its clean draws were wrong or not; seen: images that have not fallen
    judged = once if predict == "votes" else once**N
    found = [(clean.accuracy, judged), (row.accuracy, judged), (report.headline.accuracy, judged), (seen[0], once)]
    for value, expected in found:
        assert abs(value - expected) < 5 * (expected * (1 - expected) / COUNT) ** 0.5, (found, value)
    assert f"{N} fresh draws of the model" in report.to_text() and row.n_eval == (1 if predict == "votes" else N)
    assert any(f"of {N} draws" in words for words in report.title)


def test_a_step_averages_over_the_draws_that_were_asked_for_in_votes():
    seen = []

    def noisy(x):
        seen.append(len(x))
        return torch.stack([x.flatten(1).mean(1), 0 * x.flatten(1)[:, 0]], 1) + 0.01 * torch.randn(len(x), 2)

    x, y = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    counts = []
    for steps in (1, 11):
        seen.clear()
        evaluate(noisy, x, y, eps=0.01, attacks=[PGD(steps=steps, eot_iter=20)], predict="votes", n_eval=N)
        counts.append(sum(seen))
    assert counts[1] - counts[0] == 10 * 20


def test_what_is_refused():
    x, y = (part[:4] for part in digits()[2:])
    for model, predict, message in (
        (standard(), "votes", "predict='votes' needs a random model"),
        (coin, "mean", "predict"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(model, x, y, eps=0.1, attacks=[], predict=predict)
    with pytest.raises(ValueError, match="draws"):
        MajorityVote(coin, 0)


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


@pytest.mark.parametrize("predict", RIGHT)
def test_the_row_under_fixed_noise_stands_beside(predict):
    x, y = (part[:24] for part in digits()[2:])
    defence, attacks = NoisyEnsemble(standard(), 0.2, 2), [APGD(steps=8), APGD(loss="dlr", steps=8)]
    report = evaluate(defence, x, y, eps=0.15, attacks=attacks, predict=predict, n_eval=N, eot_iter=3)
    for name in ("APGD-8 ce", "APGD-8 dlr"):
        assert report.row(f"{name}, fixed noise").variant == "fixed" and report.row(name).variant == "random"
    assert report.row("worst").accuracy <= report.row("clean").accuracy - 0.3
    assert report.row("worst, fixed").n_eval == 1 and report.row("APGD-8 ce").settings["eot_iter"] in (1, 3)
