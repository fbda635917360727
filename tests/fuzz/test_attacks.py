"""Attacks with images, labels and radii of any kind: a result in the ball, or a refusal that names an argument."""

import pytest
import torch
from hypothesis import strategies as st
from mangling import fuzzed, mangled, named
from test_ops import uniform
from torch import nn

from purify_fast import attacks

pytestmark = pytest.mark.usefixtures("one_thread")
torch.manual_seed(0)
MODELS = {
    "linear": nn.Sequential(nn.Flatten(), nn.Linear(12, 5)),
    "small": nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)),
    "constant": nn.Sequential(nn.Flatten(), nn.Linear(12, 5).requires_grad_(False)),
}
with torch.no_grad():
    MODELS["constant"][1].weight.zero_()
ATTACKS = {
    "pgd": {"alpha": 0.1, "steps": 2},
    "fgsm": {},
    "apgd": {"steps": 3, "n_target_classes": 2},
    "square": {"n_queries": 4},
    "fab_t": {"steps": 2},
}


@pytest.mark.parametrize("name", ATTACKS)
@fuzzed
def test_an_attack(name, data):
    attack, draw = getattr(attacks, name), data.draw
    norm = draw(st.sampled_from(["linf", "l2", "l1"]))
    batch = draw(st.integers(0, 3))
    x = uniform(draw, batch, 1, 3, 4)
    y = torch.arange(batch) % 5
    good = {"x": x, "y": y, "eps": 0.3, **ATTACKS[name], "norm": norm, "seed": 1}
    arguments, done = mangled(draw, good, draw(st.sampled_from([0, 1, 1, 2])))
    model = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    try:
        found = attack(model, **arguments)
    except (ValueError, TypeError) as error:
        assert named(error, list(good)), (done, error)
        assert done, (error, good)
        return
    except RuntimeError:
        # the model's own, of images that it does not take
        assert any(text in str(done) for text in ("x: dtype", "x: meta", "x: flat", "x: longer", "x: empty", "x: t")), (
            done
        )
        return
    x, eps = arguments["x"], arguments.get("eps")
    assert found.shape == x.shape
    if not done:
        change = (found - x).flatten(1)
        order = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
        assert batch == 0 or bool((change.norm(order, 1) <= eps * 1.0001 + 1e-6).all())
        assert bool(((found >= 0) & (found <= 1)).all()) and not found.requires_grad
