"""A model is what it answers: rows are used again where its answers are the same, also in another process."""

import random
import sys
import types

import numpy as np
import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast.attacks import PGD
from purify_fast.judge.request.fingerprint import fingerprint

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
