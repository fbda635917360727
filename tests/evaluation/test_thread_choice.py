"""An evaluation measures its number of threads, and a resumed one takes it again."""

import pytest
import torch
from torch import nn

from purify_fast.attacks import Square
from purify_fast.data import load_dataset
from purify_fast.evaluation import evaluate
from purify_fast.evaluation.run import resources
from purify_fast.models import SmallCNN


class Seeing(nn.Module):
    """A classifier that notes with how many threads it computes."""

    seen: list[int] = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = SmallCNN(width=2)

    def forward(self, x):
        self.seen.append(torch.get_num_threads())
        return self.inner(x)


@pytest.fixture
def found(found_threads):
    """The numbers of threads that measurements find, one after the other."""
    return found_threads(resources)


@pytest.fixture
def few():
    digits = load_dataset("digits")
    return digits.x_test[:6], digits.y_test[:6]


def test_the_number_holds_inside_and_a_resumed_evaluation_takes_it_again(found, few, short_signs, tmp_path):
    def seen(seed):
        Seeing.seen.clear()
        evaluate(Seeing(), *few, eps=0.1, protocol="fast", seed=seed, out=tmp_path, progress=False)
        return Seeing.seen

    found += [1, 3]
    first = seen(0)
    assert (first[0], first[-1]) == (2, 1) and found == [3] and torch.get_num_threads() == 2
    # another seed makes other rows
    assert seen(1)[-1] == 1 and found == [3]
    torch.set_num_threads(3)
    assert seen(2)[-1] == 3 and not found and torch.get_num_threads() == 3


def test_a_model_that_refuses_gradients_is_measured_and_evaluated(found, few):
    inner = SmallCNN(width=2).eval()
    found += [1]

    def model(x):
        return inner(torch.from_numpy(x.numpy().copy())).detach()

    assert evaluate(model, *few, eps=0.1, attacks=[Square(n_queries=2)], progress=False).rows
    assert not found


def test_an_error_restores_the_number(found, few, monkeypatch):
    def fails(*args):
        assert torch.get_num_threads() == 1
        raise RuntimeError("broken")

    found += [1]
    monkeypatch.setattr("purify_fast.evaluation.runner.Measure", lambda *args, **options: fails())
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(SmallCNN(width=2), *few, eps=0.1, protocol="fast", progress=False)
    assert torch.get_num_threads() == 2
