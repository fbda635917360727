"""Fewer images go through the model at once when memory runs out, and the rows stay the same."""

import numpy as np
import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast.attacks import APGD, PGD
from purify_fast.evaluation import AttackSpec
from purify_fast.speed.memory import BatchLimit

CPU = torch.device("cpu")


class Greedy(nn.Module):
    """A linear classifier that has no room for more than so many images."""

    def __init__(self, most):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.most = nn.Linear(48, 4), most
        self.given = []

    not_dependencies = frozenset({"given"})

    def forward(self, x):
        self.given.append(len(x))
        if len(x) > self.most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate much")
        return self.layer(x.flatten(1))


def images(model, count=40):
    x = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, torch.cat([model(part).argmax(1) for part in x.split(8)])


OPTIONS = {"eps": 0.05, "attacks": [PGD(steps=3), AttackSpec(APGD(steps=5), until=0.02)]}


@pytest.mark.parametrize("most, batch_size", [(8, None), (20, 250), (8, 10)])
def test_a_batch_is_halved_until_it_fits_and_the_rows_are_those_of_enough_memory(most, batch_size, caplog):
    model = Greedy(most)
    x, y = images(model)
    report = evaluate(model, x, y, batch_size=batch_size, probes=True, **OPTIONS)
    assert max(model.given) > most
    assert f"memory ran out: from now on a forward pass has at most {5 if most == 8 else 20} images" in caplog.text
    wanted = evaluate(Greedy(1000), x, y, batch_size=batch_size, probes=True, **OPTIONS)
    for row, other in zip(report.rows, wanted.rows, strict=True):
        assert row.settings == other.settings and np.array_equal(row.robust, other.robust)


def test_a_limit_draws_the_same_again_and_gives_up_at_one_image():
    limit, seen = BatchLimit(10, CPU), []

    def work():
        seen.append((limit.at_most(100), float(torch.rand(()))))
        if limit.at_most(100) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert limit.within(work) == "done" and [count for count, _ in seen] == [100, 5, 2, 1]
    assert len({drawn for _, drawn in seen}) == 1 and limit.limit(None) == 1 and limit.limit(3) == 1
    for error in (MemoryError(), ValueError("a bug")):
        with pytest.raises(type(error)):
            limit.within(lambda error=error: (_ for _ in ()).throw(error))
    assert BatchLimit(10, CPU).limit(7) == 7 and BatchLimit(10, CPU).limit(None) is None
