"""Attacks of other people as rows: a plain function, torchattacks' PGD, and what a function must not return."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast.attacks import APGD, PGD, Attack, AttackResult
from purify_fast.attacks.base import ThreatModel
from purify_fast.evaluation import AttackSpec, as_attack
from purify_fast.judge.request.preparation import check_adversarial

EPS = 0.02
QUIET = {"eps": EPS}


@pytest.fixture
def attacked():
    """A small network with BatchNorm, whose mode matters, and images that it classifies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    model[1].running_var.fill_(0.2)
    x = torch.rand(40, 3, 8, 8)
    y = model.eval()(x).argmax(1)
    return model.train(), x, y


def my_attack(model, x, y):
    """Sign gradients: an attack that somebody wrote in a few lines."""
    points = x
    for _ in range(8):
        points = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(points), y), points)
        points = (x + (points.detach() + EPS / 4 * gradient.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
    return points


def test_a_function_is_a_row(attacked, tmp_path):
    model, x, y = attacked
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    report = evaluate(model, x, y, attacks=[my_attack, PGD(steps=10)], batch_size=16, out=tmp_path, **QUIET)
    assert report.attacks == ["clean", "my_attack", "PGD-10 ce", "worst"]
    row, other = report.row("my_attack"), report.row("PGD-10 ce")
    assert 0 < row.accuracy < 0.9 and abs(row.accuracy - other.accuracy) < 0.15
    assert row.kind == "function" and row.health is None and row.n == 40
    assert (row.settings["norm"], row.settings["eps"]) == ("linf", EPS)
    assert (report.row("worst").robust == (row.robust & other.robust)).all()
    moved = torch.as_tensor(row.examples.adversarial - row.examples.clean)
    assert 0 < moved.abs().max() <= EPS + 1e-6
    # the model is as it was, and the function's row is not kept, since its code may change
    assert model.training and all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())
    assert len(list((tmp_path / "rows").glob("*[!s].safetensors"))) == 2


def test_a_function_has_a_ball_of_its_own(attacked):
    model, x, y = attacked
    other = as_attack(lambda model, x, y: x + 0.0, name="other ball", eps=0.5, norm="l2")
    elsewhere = AttackSpec(lambda model, x, y: x, through=nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), label="moved")
    report = evaluate(model, x, y, attacks=[other, elsewhere], **QUIET)
    assert report.row("other ball, L2 0.5").threat == "L2 0.5" and report.row("moved").accuracy == 1
    with pytest.raises(ValueError, match="'half' left the ball"):
        evaluate(model, x, y, attacks=[as_attack(my_attack, name="half", eps=2 * EPS, norm="l2")], **QUIET)


@pytest.mark.parametrize(("norm", "order"), [("linf", math.inf), ("l2", 2), ("l1", 1)])
def test_rounding_is_allowed_and_no_more(norm, order):
    x = 0.25 + torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 2
    eps = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}[norm]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    length = torch.linalg.vector_norm(direction.flatten(1), ord=order, dim=1).view(-1, 1, 1, 1)
    check_adversarial("a", x + eps * direction / length, x, ThreatModel(norm, eps))
    with pytest.raises(ValueError, match=rf"'a' left the ball: .*image \d+ of the batch by \S+ .*{norm}, .* more than"):
        check_adversarial("a", x + 1.001 * eps * direction / length, x, ThreatModel(norm, eps))


WRONG_SPECIFICATIONS = [
    ({"through": "base"}, "through must be a model, .* got .base."),
    ({"max_images": 0}, "max_images must be at least 1, got 0"),
    ({"nearest": 0}, "nearest must be .*got 0"),
    ({"until": 1.5}, "until must be .*got 1.5"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_SPECIFICATIONS)
def test_a_specification_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AttackSpec(APGD(), **options)


def test_an_attack_cannot_put_the_model_into_training(attacked):
    model, x, y = attacked
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def careless(model, x, y):
        model.train()
        model(x)
        return x

    evaluate(model.eval(), x, y, attacks=[careless], **QUIET)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and not model.training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moves(Attack):
    """An attack as the documentation has one derived, which returns whatever a test wants."""

    kind: ClassVar[str] = "moves"

    move: Callable
    norm: str = "linf"
    eot_iter: int | None = None

    def name(self, context):
        return "moves"

    def threat_model(self, context):
        return ThreatModel(self.norm, context.eps)

    def cost(self, context):
        return None

    def search(self, target, x, y, context):
        return AttackResult(self.move(x))


WRONG_RESULTS = [
    (lambda x: torch.where(x > 0.5, torch.nan, x), "the attack 'moves' returned values from nan"),
    (lambda x: x[:2], r"the attack 'moves' must return torch.float32 images \[40, 3, 8, 8\] on cpu"),
    (lambda x: x.double(), "the attack 'moves' must return torch.float32 images"),
    (lambda x: x.numpy(), "the attack 'moves' must return torch.float32 images"),
    # in place: the images that it was given are no witness of how far it went
    (lambda x: x.mul_(-3), "the attack 'moves' returned values from .* must be in"),
]


@pytest.mark.parametrize("norm", [None, "l2"])
@pytest.mark.parametrize(("move", "message"), WRONG_RESULTS)
def test_what_an_attack_returns_is_checked(attacked, norm, move, message):
    """That of a class, and that of a function (None)."""
    function = as_attack(lambda model, x, y: move(x), name="moves")
    with pytest.raises(ValueError, match=message):
        evaluate(*attacked, attacks=[function if norm is None else Moves(move=move, norm=norm)], **QUIET)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "flow"])
def test_a_class_of_attacks_stays_in_its_ball(attacked, norm):
    model, x, y = attacked
    # a flow moves pixels: how far the values change is not bounded
    free = norm == "flow"
    with contextlib.nullcontext() if free else pytest.raises(ValueError, match="the attack 'moves' left the ball"):
        evaluate(model, x, y, attacks=[Moves(move=lambda x: x.neg_().add_(1), norm=norm)], **QUIET)
