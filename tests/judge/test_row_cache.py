"""Which changes throw a finished row away, and which do not."""

import os
from unittest import mock

import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast.attacks import PGD, AttackResult
from purify_fast.evaluation import as_attack
from purify_fast.judge.run import cache
from purify_fast.ops import use_backend
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
    return (x + SHIFT).clamp(0, 1)


SHIFT = 0.05


def test_a_users_attack_is_named_by_its_code_too(counted, monkeypatch):
    attacks = [Moves(), as_attack(lambda model, x, y: moved(x), revision="1")]
    assert counted(model(), attacks=attacks) == 3
    assert counted(model(), attacks=attacks) == 0
    assert counted(model(), attacks=[as_attack(lambda model, x, y: moved(x), revision="2")]) == 1
    monkeypatch.setitem(globals(), "SHIFT", 0.04)
    assert counted(model(), attacks=attacks) == 2
    monkeypatch.setitem(globals(), "moved", lambda x: (x - 0.04).clamp(0, 1))
    assert counted(model(), attacks=[Moves()]) == 1
    assert counted(model(), attacks=[Moves()]) == 0


def test_a_file_in_place_of_the_folder_is_refused_by_name(tmp_path):
    net, x, y = nn.Flatten(), torch.rand(4, 3, 2, 2), torch.arange(4) % 2
    path = tmp_path / "file.txt"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"out must be a folder, got .*file\.txt.*: .*file\.txt is a file"):
        evaluate(net, x, y, eps=0.1, attacks=[], out=path / "deeper")
    with pytest.raises(ValueError, match="folder must be a folder"):
        evaluate(net, x, y, eps=0.1, attacks=[]).save(path)
    assert path.read_text() == "mine"
