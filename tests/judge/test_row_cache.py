"""Which changes throw a finished row away, and which do not, among them the memory that is left. The tests of
fingerprints and of frozen copies follow."""

import os
import random
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast import frozen_copy, zoo
from purify_fast.attacks import APGD, PGD, AttackResult
from purify_fast.evaluation import AttackSpec, as_attack
from purify_fast.judge.request.fingerprint import fingerprint
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
    assert counted(model(), attacks=[PGD(steps=3)]) == 1 and counted(model(), seed=1) == 2
    assert counted(model(), x=torch.rand(6, 3, 3, 3)) == 2
    changed = model()
    with torch.no_grad():
        changed[1].weight[0, 0] += 1
    assert counted(changed) == 2 and counted(model()) == 0


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
        assert counted(model()) == rows and counted(model()) == 0
    assert counted(model()) == 0


class Moves(PGD):
    kind, code_version = "moves", "1"

    def search(self, target, x, y, context):
        return AttackResult(moved(x))


def moved(x):
    return (x + 0.05).clamp(0, 1)


def test_a_users_attack_is_kept_under_its_revision(counted, monkeypatch):
    function = as_attack(lambda model, x, y: moved(x), revision="1")
    assert counted(model(), attacks=[Moves(), function]) == 3 and counted(model(), attacks=[Moves(), function]) == 0
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


# -- a model is what it answers ----------------------------------------------------------------------------------------
# A model is what it answers: rows are used again where its answers are the same, also in another process.

X, Y = torch.rand(8, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
QUIET = {"eps": 0.02, "attacks": [PGD(steps=2)]}


class Same(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient


GLOBAL = nn.Linear(3, 3)
#: Stands for an installed package, whose files do not count.
package = types.SimpleNamespace(changed=lambda x: x)


class Model(nn.Module):
    """Keeps what it saw last, and a table that it makes at first use, as many models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale, self.hidden, self.made = nn.Linear(9, 3), 1.0, [nn.Linear(3, 3)], {}
        self.register_buffer("table", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.seen = self.hidden[0](self.layer(Same.apply(x).flatten(1))) + self.table
        return package.changed(GLOBAL(self.scale * self.seen)) + self.made.setdefault("ones", torch.ones(3))


#: By name: changes the model, or what its code reads.
CHANGES = {
    "weight": lambda model, patch: model.layer.weight.data.add_(1),
    "buffer that is not saved": lambda model, patch: model.table.add_(1),
    "weight in a list": lambda model, patch: model.hidden[0].weight.data.add_(1),
    "attribute": lambda model, patch: patch.setattr(model, "scale", 2.0),
    "code of forward": lambda model, patch: patch.setattr(Model, "forward", lambda self, x: self.layer(x.flatten(1))),
    "backward": lambda model, patch: patch.setattr(Same, "backward", staticmethod(lambda context, grad: 2 * grad)),
    "global network": lambda model, patch: patch.setitem(globals(), "GLOBAL", nn.Linear(3, 3)),
    "installed package": lambda model, patch: patch.setattr(package, "changed", lambda x: 2 * x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", [lambda model: model, lambda model: lambda x: model(x)], ids=["module", "function"])
def test_a_change_of_what_a_model_answers_makes_another_model(change, make, monkeypatch):
    model = Model()
    before = fingerprint(make(model), X)
    assert before == fingerprint(make(Model()), X) is not None
    change(model, monkeypatch)
    assert fingerprint(make(model), X) != before


def test_a_source_file_of_the_user_counts_by_its_text_and_by_its_name_when_it_is_gone(tmp_path, monkeypatch):
    marks, file = [fingerprint(Model(), X)], tmp_path / "module_of_the_test.py"
    monkeypatch.setitem(sys.modules, file.stem, module := types.ModuleType(file.stem))
    module.__file__ = str(file)
    for text in ("a = 1", "a = 2"):
        file.write_text(text)
        marks.append(fingerprint(Model(), X))
    file.unlink()
    assert len({*marks, fingerprint(Model(), X)}) == 4


def test_answers_leave_statistics_as_they_were():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten())
    before = [value.clone() for value in model.buffers()]
    assert None not in (fingerprint(model, X), fingerprint(lambda x: model(x), X))
    assert all(map(torch.equal, before, model.buffers()))


def test_what_predictions_leave_behind_makes_no_row_anew_and_another_revision_does(tmp_path, made_rows):
    model = Model()
    for given, revision, rows in ((model, None, 2), (model, None, 2), (Model(), None, 2), (model, "1", 4)):
        evaluate(given, X, Y, **QUIET, out=tmp_path, revision=revision)
        assert len(made_rows) == rows


def test_a_model_that_draws_from_the_system_has_its_rows_made_anew_and_it_is_said(tmp_path, caplog, made_rows):
    def model(x):
        return x.flatten(1)[:, :3] + random.SystemRandom().random()

    for _ in "12":
        evaluate(model, X, Y, **QUIET, out=tmp_path, name="mine", revision="1")
    assert len(made_rows) == 4 and not list((tmp_path / "rows").iterdir())
    assert "the rows of mine are not kept, because with the same seed, it answers the same images diff" in caplog.text


def test_a_random_model_is_the_same_under_the_same_seed_and_the_generators_go_on():
    marks, drawn = [], []
    for times in (1, 0, 2):
        torch.manual_seed(1)
        marks += [fingerprint(lambda x: x.flatten(1) + torch.rand(()) + np.random.rand() + random.random(), X)] * times
        drawn.append(float(torch.rand(())))
    assert len({*drawn}) == len({*marks}) == 1 and None not in marks


@pytest.mark.parametrize("model", [lambda x: torch.from_numpy(x.numpy()).flatten(1), lambda x: x.detach().flatten(1)])
def test_a_model_without_a_gradient_is_told_by_its_logits(model):
    one, same, other = (fingerprint(each, X) for each in (model, lambda x: model(x), lambda x: 2 * model(x)))
    assert one == same != other and None not in (one, other)


# -- frozen copies -----------------------------------------------------------------------------------------------------
# A frozen copy of a defence whose weights were changed since is judged as it is now.

FAST = {"eps": 0.1, "attacks": [], "eot_iter": 1, "n_eval": 1}


@pytest.fixture
def batch():
    return torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def zeroed(defence):
    with torch.no_grad():
        for parameter in defence.classifier.parameters():
            parameter.zero_()


def zeroed_unseen(defence):
    """Without the writes that PyTorch counts."""
    for parameter in defence.classifier.parameters():
        parameter.data.zero_()


def replaced(defence):
    defence.classifier = zoo.load("digits-standard").requires_grad_(False).eval()


@pytest.mark.parametrize("change", [zeroed, zeroed_unseen, replaced])
def test_changed_weights_are_read_again(change, batch, tmp_path):
    model = zoo.load("digits-carso-pipeline")
    copied = frozen_copy(model, batch[0], dtype=torch.float32)
    evaluate(copied, *batch, **FAST, out=tmp_path)
    change(model)
    got = evaluate(copied, *batch, **FAST, out=tmp_path)
    plain = frozen_copy(model, batch[0], dtype=torch.float32)
    assert got.row("clean").robust.tolist() == evaluate(plain, *batch, **FAST).row("clean").robust.tolist()
    with torch.no_grad(), plain.deterministic(), copied.deterministic():
        assert torch.equal(plain(batch[0]), copied(batch[0]))


WRAPPERS = [lambda d: nn.Sequential(d), lambda d: lambda x: d(x), lambda d: d.forward, None]


@pytest.mark.parametrize("around", WRAPPERS, ids=["part", "function", "method", "surrogate"])
def test_it_is_found_wherever_it_is(around, batch):
    model = zoo.load("digits-carso-pipeline")
    copied = frozen_copy(model, batch[0], dtype=torch.float32)
    zeroed_unseen(model)
    if around is None:
        attacks = {"attacks": [AttackSpec(PGD(steps=1), through=copied)]}
        evaluate(zoo.load("digits-standard"), *batch, **FAST | attacks)
    else:
        evaluate(around(copied), *batch, **FAST)
    assert not copied.classifier(batch[0]).any()
