"""``batch_size="auto"``: what goes through the model at once follows the memory, and the rows do not."""

import numpy as np
import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast.attacks import APGD, PGD
from purify_fast.evaluation import AttackSpec
from purify_fast.evaluation.run import resources
from purify_fast.speed.memory import Room, images_that_fit

CPU = torch.device("cpu")


class Greedy(nn.Module):
    """A linear classifier that has no room for more than so many images; with noise on its logits if asked."""

    def __init__(self, most, noise=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.most, self.noise = nn.Linear(48, 4), most, noise
        self.given = []

    not_dependencies = frozenset({"given"})

    def forward(self, x):
        self.given.append(len(x))
        if len(x) > self.most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate much")
        return self.layer(x.flatten(1)) + self.noise * torch.randn(len(x), 4)


def images(model, count=40):
    x = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, torch.cat([model(part).argmax(1) for part in x.split(8)])


OPTIONS = {"eps": 0.05, "attacks": [PGD(steps=3), AttackSpec(APGD(steps=5), until=0.02)]}


@pytest.mark.parametrize("most", [8, 20])
def test_a_batch_is_halved_until_it_fits_and_the_rows_are_those_of_250(most):
    model = Greedy(most)
    x, y = images(model)
    report = evaluate(model, x, y, batch_size="auto", probes=True, **OPTIONS)
    assert max(model.given) > most
    wanted = evaluate(Greedy(1000), x, y, probes=True, **OPTIONS)
    for row, other in zip(report.rows, wanted.rows, strict=True):
        assert row.settings == other.settings and np.array_equal(row.robust, other.robust)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        evaluate(Greedy(most), x, y, batch_size=250, **OPTIONS)


def test_a_random_model_goes_on_with_the_number_of_the_first_run(tmp_path, monkeypatch, made_rows):
    model = Greedy(1000, noise=0.3)
    x, y = images(model)
    found = iter([16, 512, 4])
    monkeypatch.setattr(resources, "images_that_fit", lambda *_: next(found))
    reports = []
    for made in (True, False, True):
        made_rows.clear()
        reports.append(evaluate(model, x, y, batch_size="auto", out=tmp_path, **OPTIONS))
        assert bool(made_rows) == made
    assert [row.accuracy for row in reports[0].rows] == [row.accuracy for row in reports[1].rows]


def test_what_fits_is_what_a_straight_line_through_two_sizes_says():
    # 4 bytes a number: 1 MB that is always there, and 100 kB for each image
    def work(count):
        return torch.ones(250_000), torch.ones(count, 25_000)

    for free, wanted in ((10**6, 1), (3 * 10**6, 8), (10**7, 64), (10**12, 1024)):
        assert images_that_fit(work, free, CPU) == wanted

    def draws(count):
        return torch.randn(count)

    torch.manual_seed(3)
    images_that_fit(draws, 10**9, CPU)
    after = torch.randn(2)
    torch.manual_seed(3)
    assert torch.equal(after, torch.randn(2))

    def broken(count):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        images_that_fit(broken, 10**9, CPU)


def test_room_draws_the_same_again_and_gives_up_at_one_image():
    room, seen = Room(5, CPU, yields=True), []

    def work():
        seen.append((room.at_most(100), float(torch.rand(()))))
        if room.at_most(100) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert room.within(work) == "done" and [count for count, _ in seen] == [5, 2, 1]
    assert len({drawn for _, drawn in seen}) == 1 and room.limit(None) == 1 and room.limit(3) == 1
    room = Room(1, CPU, yields=True)
    for error in (MemoryError(), ValueError("a bug")):
        with pytest.raises(type(error)):
            room.within(lambda error=error: (_ for _ in ()).throw(error))
    assert Room(None, CPU).limit(7) == 7
