"""Which changes throw a finished row away, and which do not, among them the memory that is left."""

import os
from unittest import mock

import numpy as np
import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast.attacks import APGD, PGD, AttackResult
from purify_fast.evaluation import AttackSpec, as_attack
from purify_fast.judge.results import cache
from purify_fast.ops import use_backend
from purify_fast.speed.memory import BatchLimit
from purify_fast.speed.precision import float32_products


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(27, 4))


@pytest.fixture
def counted(tmp_path, made_rows):
    """``evaluate`` into one folder, which tells how many rows it made anew."""
    x, y = torch.rand(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4

    def run(model, x=x, **change):
        made_rows.clear()
        evaluate(model, x, y, **{"eps": 0.1, "attacks": [PGD(steps=2)], "out": tmp_path} | change)
        return len(made_rows)

    return run


def test_what_decides_a_row_makes_it_anew(counted):
    assert counted(model()) == 2
    assert counted(model(), eps=0.2) == 1  # the clean row stays
    assert counted(model(), attacks=[PGD(steps=3)]) == 1
    assert counted(model(), seed=1) == 2
    assert counted(model(), x=torch.rand(6, 3, 3, 3)) == 2
    changed = model()
    with torch.no_grad():
        changed[1].weight[0, 0] += 1
    assert counted(changed) == 2
    assert counted(model()) == 0


@pytest.mark.parametrize(
    ("block", "rows"),
    [
        (lambda: mock.patch.object(PGD, "revision", lambda self: "another"), 1),
        (lambda: mock.patch.object(cache, "RESULTS_VERSION", cache.RESULTS_VERSION + 1), 2),
        (lambda: mock.patch.dict(os.environ, PURIFY_FAST_BACKEND="reference"), 2),
        (lambda: use_backend("reference"), 2),
        (lambda: float32_products(tf32=True), 2),
        (lambda: torch.autocast("cpu", torch.bfloat16), 2),
        (float32_products, 0),
    ],
    ids=["revision of an attack", "protocol", "backend", "backend of a block", "tf32", "autocast", "float32"],
)
def test_versions_backends_and_precisions_have_rows_of_their_own(counted, block, rows):
    assert counted(model()) == 2
    with block():
        assert counted(model()) == rows
        assert counted(model()) == 0
    assert counted(model()) == 0


class Moves(PGD):
    kind, code_version = "moves", "1"

    def search(self, target, x, y, context):
        return AttackResult(moved(x))


def moved(x):
    return (x + 0.05).clamp(0, 1)


def test_a_users_attack_is_kept_under_its_revision(counted, monkeypatch):
    function = as_attack(lambda model, x, y: moved(x), revision="1")
    assert counted(model(), attacks=[Moves(), function]) == 3
    assert counted(model(), attacks=[Moves(), function]) == 0
    assert counted(model(), attacks=[as_attack(function.function, revision="2")]) == 1
    monkeypatch.setattr(Moves, "code_version", "2")
    assert [counted(model(), attacks=[Moves()]) for _ in "12"] == [1, 0]
    assert [counted(model(), attacks=[function.function]) for _ in "12"] == [1, 1]


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
