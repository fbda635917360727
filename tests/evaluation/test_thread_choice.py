"""An evaluation measures its number of threads, and a resumed one takes it again."""

import pytest
import torch
from digit_nets import zoo_digits
from torch import nn

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


def test_the_number_holds_inside_and_a_resumed_evaluation_takes_it_again(found, short_signs, tmp_path):
    def seen(seed):
        Seeing.seen.clear()
        evaluate(Seeing(), *zoo_digits(6), eps=0.1, protocol="fast", seed=seed, out=tmp_path, progress=False)
        return Seeing.seen

    found += [1, 3]
    first = seen(0)
    assert (first[0], first[-1]) == (2, 1) and found == [3] and torch.get_num_threads() == 2
    # another seed makes other rows
    assert seen(1)[-1] == 1 and found == [3]
    torch.set_num_threads(3)
    assert seen(2)[-1] == 3 and not found and torch.get_num_threads() == 3


def test_an_error_restores_the_number(found, monkeypatch):
    def fails(*args):
        assert torch.get_num_threads() == 1
        raise RuntimeError("broken")

    found += [1]
    monkeypatch.setattr("purify_fast.evaluation.runner.Measure", lambda *args, **options: fails())
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(SmallCNN(width=2), *zoo_digits(6), eps=0.1, protocol="fast", progress=False)
    assert torch.get_num_threads() == 2
