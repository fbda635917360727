"""A checkpoint gives back names that are numbers, and the values of get_extra_state."""

import pytest
import torch
from small_runs import StopAt, Stopped, images
from torch import nn

from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit
from purify_fast.training.checkpoint import read_model, read_tree, save_model, write_tree

pytestmark = pytest.mark.usefixtures("one_thread")


class Named(nn.Module):
    """A model whose only parameter has the given name."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.zeros(64, 2)))

    def forward(self, x):
        return x.flatten(1) @ getattr(self, self.name)


class Extra(nn.Linear):
    value = None

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


def extra(value):
    made = nn.Sequential(nn.Flatten(), Extra(64, 2))
    made[1].value = value
    return made


def run(made, folder, **options):
    torch.manual_seed(0)
    task = ClassifierTask(made, ClassifierConfig())
    config = FitConfig(3, 16, checkpoint_seconds=0, validation_share=0.25, keep_best="loss")
    fit(task, *images(), config, folder, progress=False, **options)
    return task


MODELS = {
    **{name: lambda name=name: Named(name) for name in ("0", "007", "'", "'0", "tensor of purify_fast")},
    "extra": lambda: extra({"version": 3, "0": [1, None, {2: "x"}]}),
    "extra tensor": lambda: extra(torch.arange(3.0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_run_continues_whatever_the_names_in_its_state_are(name, tmp_path):
    torch.manual_seed(1)
    whole = run(MODELS[name](), tmp_path / "whole")
    torch.manual_seed(1)
    with pytest.raises(Stopped):
        run(MODELS[name](), tmp_path / "cut", callbacks=[StopAt(5)])
    torch.manual_seed(1)
    resumed = MODELS[name]()
    if name.startswith("extra"):
        resumed[1].value = None if name == "extra" else torch.zeros(3)
    run(resumed, tmp_path / "cut")
    assert all(map(torch.equal, whole.model.parameters(), resumed.parameters()))
    if name.startswith("extra"):
        assert str(resumed[1].value) == str(MODELS[name]()[1].value)


@pytest.mark.parametrize(
    "value",
    [{1, 2}, b"packed", {"a": torch.zeros(2)}, {-1: 2}, (1, 2), object()],
    ids=lambda value: type(value).__name__,
)
def test_extra_state_that_would_not_come_back_is_refused_before_any_step(value, tmp_path):
    with pytest.raises(ValueError, match=r"get_extra_state must return tensors, or dicts .*1\._extra_state = "):
        run(extra(value), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_trees_and_models_keep_texts_that_look_like_numbers(tmp_path):
    tree = {"0": 1, 0: 2, "'": 3, "'0": {"1": [{"2": 4}]}}
    write_tree(tmp_path / "tree", tree)
    assert read_tree(tmp_path / "tree") == tree
    state = {"0": torch.ones(2), "1._extra_state": {"0": 5, 1: 6}}
    save_model(tmp_path, "Kind", {}, state)
    facts, back = read_model(tmp_path)
    assert torch.equal(back.pop("0"), state.pop("0"))
    assert back == state and facts.keys() == {"kind", "arguments", "version"}


@pytest.mark.parametrize("how", ["frozen", "no gradient", "detached"])
def test_a_model_without_a_weight_to_train_is_refused(how):
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    if how == "frozen":
        made.requires_grad_(False)
    forward = made.forward
    if how == "no gradient":
        made.forward = torch.no_grad()(forward)
    if how == "detached":
        made.forward = lambda x: forward(x).detach()
    with pytest.raises(ValueError, match=r"the loss depends on no weight that can be trained: call requires_grad_"):
        run(made, None)
