"""Which steps are compiled, that they follow what a model is, and that a wrong compilation never serves."""

import pickle
import random

import pytest
import torch
from small_runs import carso_task
from torch import Tensor, nn

from purify_fast import frozen_copy
from purify_fast.attacks import pgd
from purify_fast.defences import Defence
from purify_fast.judge.run.measure import Progress, counted_model
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed import InferenceCopy
from purify_fast.speed.agreement import nearly_as_exact
from purify_fast.speed.graphs.step_loop import eager_steps

pytestmark = pytest.mark.usefixtures("one_thread", "compiler")


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    made = SmallCNN(3, 10, (8, 8), width).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3)
    return made


def copies(dtype: torch.dtype = torch.float32) -> tuple[InferenceCopy, InferenceCopy]:
    """A copy, and one whose steps are compiled. Calls of the second are not, so that graphs of steps can be counted."""
    plain, other = (InferenceCopy(network(), (3, 8, 8), dtype) for _ in "12")
    other.compile_steps()
    return plain, other


def attack(model: nn.Module, images: int = 8, **options) -> Tensor:
    x = torch.rand(images, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    how = {"alpha": 2 / 255, "steps": 4, "random_start": False} | options
    return pgd(model, x, torch.arange(images) % 10, 8 / 255, **how)


def equal(copies: tuple[nn.Module, nn.Module], **options) -> bool:
    return torch.equal(*(attack(one, **options) for one in copies))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_one_graph_for_each_batch_size(compiler, dtype):
    both = copies(dtype)
    for images in (8, 8, 5, 8, 5):
        assert equal(both, images=images)
    assert len(compiler) == 2 and both[1].steps.checked and not both[1].steps.refusal
    # the length of a step, the radius and the start are inputs
    for options in ({"alpha": None}, {"alpha": 1 / 255}, {"random_start": True, "seed": 3}):
        assert equal(both, **options)
    assert len(compiler) == 2


#: Each change negates or bounds something, so that the network computes something else.
CHANGES = {
    "values": lambda net: [weight.mul_(-1) for weight in net.parameters()],
    "weight": lambda net: setattr(net.hidden, "weight", nn.Parameter(-net.hidden.weight.detach(), False)),
    "setting": lambda net: setattr(net.conv2, "padding_mode", "reflect"),
    "hook": lambda net: net.conv2.register_forward_hook(lambda module, given, out: -out),
    "layer": lambda net: setattr(net, "conv2", nn.Sequential(net.conv2, nn.Tanh())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_compiled_step_follows_the_network(compiler, change):
    both = copies()
    before = attack(both[1])
    with torch.no_grad():
        for one in both:
            CHANGES[change](one.classifier)
    assert equal(both) and not torch.equal(before, attack(both[1]))
    assert len(compiler) == (1 if change in ("values", "weight") else 2)


def test_a_frozen_copy_follows_its_model_and_can_be_pickled(compiler):
    model, x = network(), torch.rand(8, 3, 8, 8)
    plain, fast = (frozen_copy(model, x, dtype=torch.float32, compile=compile) for compile in (False, True))
    assert equal((plain, fast)) and fast.about.endswith("compiled")
    with torch.no_grad():
        model.hidden.weight.mul_(-2)
    assert equal((plain, fast)) and fast.steps.checked and not fast.steps.refusal
    assert equal((plain, pickle.loads(pickle.dumps(fast))))


def test_what_is_not_compiled_as_a_whole(compiler):
    both = copies()
    with eager_steps():
        attack(both[1])
    attack(counted_model(both[1], Progress("", False)))
    attack(both[1], stop_when_fallen=True)
    assert not compiler and not both[1].steps.checked


class Odd(nn.Module):
    """A network that does something that a compiled step cannot repeat."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.last, self.own = how, nn.Linear(192, 10), random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        factor = 1.0
        if self.how == "reads":
            factor = 1.0 if float(x.mean()) > 0.1 else -1.0
        elif self.how == "draws on the host":
            factor = 1 + random.random() / 10
        elif self.how == "draws from its own generator":
            # The compiler would take the first number for a constant.
            factor = 1 + self.own.random() / 1000
        return self.last(x.flatten(1)) * factor


@pytest.mark.parametrize("must", [False, True])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("reads", "data-dependent"),
        ("draws on the host", "the step draws random numbers on the host"),
        ("draws from its own generator", "the step draws random numbers on the host"),
    ],
)
def test_a_step_that_cannot_be_compiled_is_refused_with_its_reason(how, reason, must, caplog):
    model = InferenceCopy(Odd(how), (3, 8, 8), torch.float32)
    model.compile_steps(must)
    random.seed(0)
    if must:
        with pytest.raises(
            ValueError, match=r"compile must be False: an attack on InferenceCopy cannot be compiled \(.*\), got True"
        ) as refused:
            attack(model)
        assert reason in str(refused.value)
    else:
        with caplog.at_level("WARNING"):
            found = [attack(model) for _ in "12"]
        assert caplog.text.count("is not compiled") == 1 and reason in model.steps.refusal
        assert all(one.isfinite().all() for one in found)


def test_a_wrong_compiled_step_never_serves(monkeypatch, caplog):
    plain, other = copies()
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda step, state: {"point": state["x"] - 0.01})
    with caplog.at_level("WARNING"):
        assert equal((plain, other))
    assert "it gives another result (point)" in caplog.text


@pytest.mark.parametrize("mode", ["fresh", "fixed", "off"])
def test_the_seeds_of_a_random_defence_are_inputs_of_a_compiled_step(compiler, mode):
    defence = carso_task("pipeline").defence.eval()
    x, y = torch.rand(4, *defence.image_shape, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    plain, other = (defence.computing_in(torch.float32) for _ in "12")
    other.classifier.compile_steps(True)

    def found_by(one: Defence) -> Tensor:
        blocks = {"fresh": one.noise_ids(torch.arange(4)), "fixed": one.fixed_noise(3), "off": one.deterministic()}
        torch.manual_seed(5)
        with blocks[mode]:
            return torch.cat([pgd(one, x, y, 0.1, steps=3, alpha=0.03, seed=2, eot_iter=2) for _ in "12"])

    found = found_by(plain), found_by(other)
    assert torch.equal(*found) and compiler
    halves = found[1].split(4)
    assert torch.equal(*halves) == (mode != "fresh")


def test_a_compiled_step_must_be_about_as_near_to_float32_as_the_step_as_written():
    before = torch.rand(4, 3, 16, 16)
    exact = before + 0.01 * torch.randn_like(before).sign()

    def flipped(share: float) -> Tensor:
        return torch.where(torch.rand_like(before) < share, 2 * before - exact, exact)

    written = flipped(0.17)  # the cosine of a ResNet-50 in bfloat16, 0.66
    assert nearly_as_exact(flipped(0.17), written, exact, before) and nearly_as_exact(exact, written, exact, before)
    assert not nearly_as_exact(flipped(0.25), written, exact, before)
    assert not nearly_as_exact(flipped(0.1), exact, exact, before)
    scores, worse = torch.tensor([-torch.inf, 1.0, 2.0]), torch.tensor([-torch.inf, 1.0, 2.5])
    assert nearly_as_exact(scores, scores, scores, 0 * scores) and not nearly_as_exact(worse, scores, scores, scores)
    assert not nearly_as_exact(scores, worse.nan_to_num(neginf=0.0), scores, scores)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_compiles_a_step(monkeypatch, dtype):
    monkeypatch.undo()
    torch._dynamo.reset()
    both = copies(dtype)
    apart = (attack(both[0]) - attack(both[1])).abs() > 1e-6
    assert apart.float().mean() < (0.002 if dtype == torch.float32 else 0.05) and not both[1].steps.refusal
