"""The attacks as functions: what an editor shows of them, and what a wrong option says."""

import dataclasses
import inspect
import pickle

import pytest
import torch

from purify_fast import attacks
from purify_fast.attacks import AttackContext
from purify_fast.attacks.context import Resources
from purify_fast.attacks.functions import run_alone

pytestmark = pytest.mark.usefixtures("one_thread")

#: The class of each function, and the defaults that differ from those of its fields.
FUNCTIONS = {
    "pgd": (attacks.PGD, {"steps": 40, "keep_best": False}),
    "fgsm": (attacks.FGSM, {"seed": 0}),
    "apgd": (attacks.APGD, {"precision": "float32"}),
    "fab_t": (attacks.FABT, {"precision": "float32"}),
    "square": (attacks.Square, {"precision": "float32"}),
    "stadv": (attacks.StAdv, {"steps": 20, "keep_best": False}),
    "branch_and_bound": (attacks.BranchAndBound, {}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_editor_sees_every_option(name):
    function, (kind, defaults) = getattr(attacks, name), FUNCTIONS[name]
    seen = inspect.signature(function).parameters
    context = {field.name: field.default for kind in (AttackContext, Resources) for field in dataclasses.fields(kind)}
    own = {field.name: field.default for field in dataclasses.fields(kind)}
    added = {"health": None, "generator": None, "seed": None}
    if "loss" in own:
        added |= {"targeted": None, "mode": "eval"}
    if name == "pgd":
        added["stop_when_fallen"] = False
    # an attack returns its counts; a function adds them to the object that its caller gave
    for other in ("counts_health", "resources", "loss_function", "keep_mode", "eps"):
        del context[other]
    wanted = {**context, **own, **added, **defaults} | ({"norm": context["norm"]} if "norm" in own else {})
    assert list(seen)[:4] == ["model", "x", "y", "eps"] and set(seen) == {"model", "x", "y", "eps", *wanted}
    for option, default in wanted.items():
        if option != "eps" and default is not dataclasses.MISSING:
            assert seen[option].default == default, option
            assert seen[option].kind is inspect.Parameter.KEYWORD_ONLY
    assert (function.__name__, function.__module__) == (name, kind.__module__)
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize(
    ("option", "near"), [("epsilon", r".*\beps\b"), ("step", "steps"), ("zzzzz", "alpha, .*, eps, .*, steps, ")]
)
def test_a_wrong_name_is_refused_with_the_nearest(model, option, near):
    x, y = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=f"PGD has no option '{option}': try {near}"):
        attacks.pgd(model, x, y, eps=0.1, **{option: 1})
    with pytest.raises(TypeError, match=f"AttackContext has no option '{option}': "):
        attacks.PGD()(model, x, y, eps=0.1, **{option: 1})


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "stadv"])
def test_a_radius_is_needed(model, name):
    x, y = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=f"eps is missing: {FUNCTIONS[name][0].__name__} needs a radius"):
        getattr(attacks, name)(model, x, y)


def test_a_function_runs_its_class_with_its_defaults(model):
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    found = attacks.pgd(model, x, y, eps=0.1, seed=3, alpha=0.02, sample_ids=torch.tensor([4, 1, 9]))
    options = {"eps": 0.1, "seed": 3, "alpha": 0.02, "sample_ids": torch.tensor([4, 1, 9])}
    assert torch.equal(found, run_alone(attacks.PGD, model, x, y, steps=40, keep_best=False, **options))
    assert not torch.equal(found, attacks.pgd(model, x, y, **options, steps=1))
