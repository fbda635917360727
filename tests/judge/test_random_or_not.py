"""Two predictions show whether a model draws random numbers, whatever the size of its logits."""

import pytest
import torch
from digit_nets import held_out, standard
from evaluating import evaluate
from small_models import Made

from purify_fast.attacks import PGD
from purify_fast.attacks.attacked_model import differ
from purify_fast.autoattack import AutoAttack


def scaled(scale, offset, sigma):
    """The network behind noise of a standard deviation ``sigma``, its logits scaled and moved."""
    return Made(lambda self, x: scale * (self.inner(x + sigma * torch.randn_like(x)) + offset), inner=standard())


def last_bits(scale, offset):
    """A deterministic network whose sums are added up in another order every time, as kernels on a GPU may do it."""

    def how(self, x):
        logits = scale * (self.inner(x) + offset)
        bits = logits.abs().amax() * torch.finfo(logits.dtype).eps
        return logits + bits * torch.randint(-2, 3, logits.shape)

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


def test_the_class_autoattack_averages_draws_of_such_a_model(capsys):
    x, y = surest_first(24)
    adversary = AutoAttack(sometimes(off_the_grid), norm="Linf", eps=0.1, attacks_to_run=["apgd-ce"], version="custom")
    adversary.apgd.n_iter = 2
    adversary.run_standard_evaluation(x, y)
    assert "the model is random, but each step uses a single draw" in capsys.readouterr().out


def test_what_is_not_finite_is_compared_too():
    logits = torch.tensor([[torch.inf, 1.0, -2.0], [torch.nan, 0.0, 3.0], [-torch.inf, -torch.inf, -torch.inf]])
    assert not differ(logits, logits.clone())
    assert not differ(logits, logits * (1 + 1e-7))
    changes = [(0, 0, 5.0), (0, 0, torch.nan), (1, 0, 0.0), (1, 2, 3.1), (2, 2, torch.inf), (0, 1, 1.1)]
    for row, column, value in changes:
        other = logits.clone()
        other[row, column] = value
        assert differ(logits, other) and differ(other, logits)
    empty = torch.full((2, 3), torch.nan)
    assert not differ(empty, empty) and differ(empty, torch.zeros(2, 3))
