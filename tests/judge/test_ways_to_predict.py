"""The worst of several draws of a random model, and their majority."""

import pytest
import torch
from digit_nets import held_out, standard
from evaluating import evaluate

from purify_fast.attacks import PGD
from purify_fast.attacks.base import ThreatModel
from purify_fast.defences import MajorityVote, NoisyEnsemble
from purify_fast.judge.request.subject import Subject

N = 5


def coin(x):
    """Class 0, and in a fifth of the draws of each image class 1, however sure."""
    wrong = torch.rand(len(x)) < 0.2
    return torch.stack([(~wrong).float(), wrong * (1 + 9 * torch.rand(len(x)))], 1) + 0 * x.flatten(1)[:, :1]


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


def test_what_is_refused():
    x, y = held_out(4)
    for model, predict, message in (
        (standard(), "worst_of", "predict='worst_of' needs a random model"),
        (coin, "votes", "predict must be one of worst_of, got 'votes'"),
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


def test_a_vote_of_a_deterministic_model_predicts_once():
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
    assert alone == vote and "a copy without noise" in vote
    assert all(subject.is_random for subject in subjects)


def test_votes_that_agree_do_not_hide_the_draws():
    """All votes of a sure class agree, although the draws differ."""
    x, y = torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.int64)
    model = MajorityVote(lambda x: torch.tensor([[60.0, 0.0]]) + torch.rand(len(x), 2), 3)
    assert Subject(model, x, y, batch_size=4, n_eval=1, seed=0).is_random
