"""When a step is compiled as a whole, that it follows its weights, and that a wrong compilation never serves."""

import pickle
import random
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from direct import direct
from small_runs import batch, carso_task
from torch import Tensor, nn

from purify_fast import frozen_copy
from purify_fast.attacks import pgd
from purify_fast.attacks.context import TimeIsOver
from purify_fast.attacks.objective import GradientStep, Objective
from purify_fast.judge.run.progress import counted_model
from purify_fast.models.classifiers import SmallCNN
from purify_fast.protocols import CompilesSteps, Passes
from purify_fast.speed import InferenceCopy, StepGraphs
from purify_fast.speed.graphs import compiled_step as compiling
from purify_fast.speed.graphs.compiled_step import agrees, compiled_step
from purify_fast.speed.graphs.step_loop import eager_steps, parts_of
from purify_fast.zoo import load

pytestmark = pytest.mark.usefixtures("one_thread")
torch_compile = torch.compile


@pytest.fixture(autouse=True)
def fast_compiler(monkeypatch):
    """The real compiler would take most of the time of these tests, and changes no decision."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    compile = torch.compile
    fast = {"backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, **options | fast))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    made = SmallCNN(3, 10, (8, 8), width).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3)
    return made


def attack(model: nn.Module, graphs: StepGraphs | None = None, images: int = 8, steps: int = 4) -> Tensor:
    x = torch.rand(images, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"eps": 8 / 255, "alpha": 2 / 255, "steps": steps, "random_start": False, "graphs": graphs}
    return direct(pgd, model, x, torch.arange(images) % 10, **options)


def inference_copy(dtype: torch.dtype = torch.float32, compile: bool = True) -> InferenceCopy:
    return InferenceCopy(network(), (3, 8, 8), dtype, compile=compile)


def compiled(copy: nn.Module) -> list:
    """The compiled steps of a copy."""
    every = [part.compiled_steps() for part in parts_of(copy, CompilesSteps)]
    return [step.compiled[0] for steps in every if steps is not None for step in steps.by_key.values() if step.compiled]


def different(got: Tensor, want: Tensor) -> float:
    """The share of the pixels that differ."""
    return float(((got - want).abs() > 1e-6).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_compiled_once_for_each_batch_size_when_it_begins_again(dtype):
    model = inference_copy(dtype)
    wanted = attack(inference_copy(dtype, compile=False))
    for images in (8, 8, 6, 8, 6):
        found = attack(model, images=images)
        assert different(found, wanted[:images]) < 0.05
    before = compiled(model)
    assert len(before) == 2
    attack(model)
    assert compiled(model) == before and attack(inference_copy(compile=False)) is not None


def test_a_compiled_step_uses_weights_that_change_in_place():
    model = inference_copy()
    attack(model), attack(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1)
    plain = inference_copy(compile=False)
    plain.load_state_dict(model.state_dict())
    assert different(attack(model), attack(plain)) < 0.05


class Signed(nn.Module):
    """A linear model with a setting that is no tensor."""

    def __init__(self):
        super().__init__()
        self.layer, self.sign = nn.Linear(192, 10), 1.0

    def forward(self, x):
        return self.sign * self.layer(x.flatten(1))


def test_a_step_is_compiled_anew_for_a_model_with_other_settings():
    torch.manual_seed(0)
    model = Signed().eval()
    copy = frozen_copy(model, torch.rand(2, 3, 8, 8), dtype=torch.float32, compile=True)
    attack(copy), attack(copy)
    assert compiled(copy)
    model.sign = -1.0
    for _ in range(2):
        assert different(attack(copy), attack(model)) < 0.05
    assert compiled(copy)


def test_a_step_is_compiled_anew_for_a_weight_that_was_replaced():
    """In a copy of a defence for its training, the purifier is that of the defence itself."""
    defence = carso_task("pipeline").defence.eval()
    copy = defence.computing_in(torch.float32, compile=True)
    given, steps = batch(1), 4

    def attacked(model: nn.Module) -> Tensor:
        torch.manual_seed(3)
        return pgd(model, given.x, given.y, 0.1, alpha=0.02, steps=steps, random_start=False)

    attacked(copy), attacked(copy)
    assert len(compiled(copy)) == 1
    bias = defence.condition_encoder.get_parameter(next(iter(dict(defence.condition_encoder.named_parameters()))))
    bias.data = -2 * bias.data
    for _ in range(2):
        assert different(attacked(copy), attacked(defence)) < 0.05
    assert len(compiled(copy)) == 2


def test_the_steps_of_a_training_are_compiled_at_once_and_each_failure_is_an_error():
    copy = inference_copy()
    copy.steps.at_once = True
    attack(copy)
    assert len(compiled(copy)) == 1
    with eager_steps():
        attack(copy, images=6)
    assert len(compiled(copy)) == 1
    other = pickle.loads(pickle.dumps(copy))
    assert other.steps.at_once and not compiled(other) and len(compiled(copy)) == 1
    copy.steps.by_key.clear()
    text = r"compile must be False: an attack on InferenceCopy cannot be compiled .*no compiler here\), got True"
    fails = mock.patch.object(compiling, "_traced", side_effect=ValueError("no compiler here"))
    with fails, pytest.raises(ValueError, match=text):
        attack(copy)
    none_left = mock.patch("purify_fast.speed.graphs.compiled_steps.MOST_STEPS", 0)
    with none_left, pytest.raises(ValueError, match="0 others of its copy are compiled"):
        attack(copy)


@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_a_wrong_compiled_step_never_serves(monkeypatch, caplog, fault):
    original = compiling._traced

    def traced(function, state):
        if fault == "fails":
            raise ValueError("no compiler here")
        run = original(function, state)

        def against(state):
            new = run(state)
            return {**new, "point": 2 * state["point"] - new["point"]}

        return against

    monkeypatch.setattr(compiling, "_traced", traced)
    model = inference_copy()
    first, second = attack(model), attack(model)
    assert torch.equal(first, second) and not compiled(model)
    reason = "ValueError: no compiler here" if fault == "fails" else "it gives another result"
    assert f"a step of InferenceCopy is not compiled: {reason}" in caplog.text


@pytest.mark.slow
def test_the_compiled_step_is_captured(rerun):
    graphs = StepGraphs("always", rerun)
    assert different(attack(inference_copy(), graphs), attack(inference_copy(compile=False))) < 0.05
    (captured,) = graphs._captured.values()
    assert rerun.recorded == 1 and callable(captured.objects[-1][0])


def test_a_caller_under_autocast_gets_the_compiled_step_in_the_same_precision():
    model = inference_copy(compile=False)
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    step = GradientStep(Objective(model, "ce"))
    zeros = torch.zeros(8)
    state = {"point": x, "y": torch.arange(8), "image": torch.zeros_like(x), "loss": zeros, "wrong": zeros}
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = step(state), compiled_step(step, state)[0](state)
    assert torch.allclose(found["image"], wanted["image"], rtol=1e-4, atol=1e-7)


@dataclass(frozen=True)
class Noisy:
    model: nn.Module

    def __call__(self, state):
        return {"x": self.model(state["x"]) + torch.rand_like(state["x"])}


def test_a_step_that_draws_random_numbers_is_not_compiled():
    with pytest.raises(RuntimeError, match="draws random numbers in the operator aten"):
        compiled_step(Noisy(nn.Identity()), {"x": torch.zeros(3)})


class Reads(nn.Module):
    """Reads the value of a weight on the host, or draws there."""

    def __init__(self, how):
        super().__init__()
        self.how, self.scale = how, nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        reads = {
            "float": lambda: float(self.scale),
            "item": lambda: self.scale.item(),
            "list": lambda: self.scale.detach().view(1).tolist()[0],
            "array": lambda: float(self.scale.detach().numpy()),
            "branch": lambda: 1.0 if self.scale > 1 else 2.0,
            "draw": random.random,
        }
        return x * reads[self.how]()


@dataclass(frozen=True)
class Applied:
    model: nn.Module

    def __call__(self, state):
        return {"x": self.model(state["x"])}


@pytest.mark.parametrize("how", ["float", "item", "list", "array", "branch", "draw"])
def test_a_step_that_reads_or_draws_on_the_host_is_not_compiled(how):
    with pytest.raises(RuntimeError, match=r"reads the value of a tensor by|draws random numbers on the host"):
        compiled_step(Applied(Reads(how)), {"x": torch.ones(3)})


class Clock:
    """A count of images that ends after some calls, as a limit of time does."""

    def __init__(self, most):
        self.images, self.calls, self.most = Passes(), 0, most

    def count(self, images):
        self.images, self.calls = self.images + images, self.calls + 1
        if self.calls > self.most:
            raise TimeIsOver


def test_compiled_steps_count_images_and_end_with_the_time():
    x, y = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    found = []
    for compile in (False, True):
        fast = frozen_copy(network(), x, dtype=torch.float32, compile=compile)
        counted = counted_model(fast, Clock(100))
        for _ in range(3):
            before = counted.counted()
            pgd(counted, x, y, 0.03, steps=6, alpha=0.01)
            found.append(counted.counted() - before)
        assert bool(compiled(fast)) is compile
    assert len(set(found)) == 1
    counted.progress.most = counted.progress.calls + 3
    with pytest.raises(TimeIsOver):
        pgd(counted, x, y, 0.03, steps=6, alpha=0.01)


def test_a_compiled_copy_follows_hooks():
    model, x = network(), torch.rand(8, 3, 8, 8)
    fast = frozen_copy(model, x, dtype=torch.float32, compile=True)
    fast(x)
    model.conv1.register_forward_hook(lambda module, given, output: 3 * output)
    fast.update()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3)
    for _ in range(3):
        assert different(attack(fast), attack(model)) < 0.05


@pytest.mark.parametrize(
    ("got", "same"),
    [
        ({"point": [[1.0, 2.0]], "loss": [3.0]}, True),
        ({"point": [[1.1, 2.0]], "loss": [3.01]}, True),
        ({"point": [[0.0, 0.0]], "loss": [3.0]}, False),
        ({"point": [[-1.0, -2.0]], "loss": [3.0]}, False),
        ({"point": [[1.0, 2.0]], "loss": [4.0]}, False),
        ({"point": [[1.0, float("nan")]], "loss": [3.0]}, False),
        ({"point": [[1.0, 2.0]], "loss": [float("inf")]}, False),
        ({"point": [[1.0, 2.0]]}, False),
    ],
)
def test_results_agree_up_to_rounding_only(got, same):
    wanted, before = {"point": [[1.0, 2.0]], "loss": [3.0]}, {"point": [[0.0, 0.0]], "loss": [0.0]}
    tensors = [{name: torch.tensor(value) for name, value in one.items()} for one in (got, wanted, before)]
    assert agrees(*tensors) is same


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-pgd-at", "digits-arrest"])
def test_compiled_steps_agree_on_the_models_of_the_zoo(monkeypatch, name):
    """With Inductor itself: the same logits within the tolerance of a copy, and the same direction."""
    monkeypatch.undo()
    model = load(name)
    shape = (1, 16, 16)
    made = InferenceCopy(getattr(model, "classifier", model), shape, torch.bfloat16)
    x = torch.rand(16, *shape, generator=torch.Generator().manual_seed(3))
    y = made(x).argmax(1)
    step = GradientStep(Objective(made, "ce"))
    state = {"point": x, "y": y, "image": torch.zeros_like(x), "loss": torch.zeros(16), "wrong": torch.zeros(16)}
    wanted = step(state)
    got = compiled_step(step, state)[0](state)
    assert agrees(got, wanted, state)
    assert (got["loss"] - wanted["loss"]).abs().max() <= 0.05 * wanted["loss"].abs().max()


@dataclass(frozen=True)
class Seeded:
    """Draws a seed, as a random defence does, and computes with it."""

    model: nn.Module

    def __call__(self, state):
        return {"x": self.model(state["x"]) * (torch.randint(2**62, (1,)) % 1000 + 1)}


def test_the_seeds_of_a_compiled_step_are_drawn_outside_of_it():
    state, step = {"x": torch.ones(3)}, Seeded(nn.Identity())
    made, _ = compiled_step(step, state)
    torch.manual_seed(5)
    wanted = [step(state)["x"] for _ in range(2)]
    torch.manual_seed(5)
    found = [made(state)["x"] for _ in range(2)]
    assert all(map(torch.equal, found, wanted)) and not torch.equal(*wanted)


def test_a_step_is_compiled_once_although_two_of_its_tensors_are_the_same_or_it_is_captured(rerun, monkeypatch):
    graphs_of = []
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, inputs: graphs_of.append(len(inputs)) or graph.forward)
    monkeypatch.setattr(torch, "compile", torch_compile)
    model = inference_copy()
    # Without a random start, the first point is x itself.
    for graphs in (None, None, None, StepGraphs("always", rerun)):
        attack(model, graphs)
    # The capture compiles its own step, once.
    assert rerun.recorded == 1 and len(graphs_of) == 2


def test_a_capture_compiles_no_model_whose_step_is_compiled(rerun, monkeypatch):
    model, modules = inference_copy(), []
    fast = {"backend": lambda graph, inputs: modules.append(len(inputs)) or graph.forward}
    monkeypatch.setattr(torch, "compile", lambda function, **options: torch_compile(function, **options | fast))
    model.classifier.compile()
    attack(model, StepGraphs("always", rerun))
    # The backend of the compiled step is this one, too.
    assert rerun.recorded == 1 and len(modules) == 1
    model(torch.rand(8, 3, 8, 8))
    assert len(modules) == 2


def test_a_copy_is_compiled_for_its_comparison_and_not_again_for_its_calls(monkeypatch):
    compiled = []
    fast = {"backend": lambda graph, inputs: compiled.append(len(inputs)) or graph.forward}
    monkeypatch.setattr(torch, "compile", lambda function, **options: torch_compile(function, **options | fast))
    x = torch.rand(2, 3, 8, 8)
    copy = frozen_copy(network(), x, dtype=torch.float32, compile=True)
    # With a gradient and without.
    assert len(compiled) == 2
    with torch.no_grad():
        copy(x)
    torch.autograd.grad(copy(x.requires_grad_()).sum(), x)
    assert len(compiled) == 2


def test_a_step_compiled_with_fresh_noise_does_not_serve_fixed_noise(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, inputs: graph.forward)
    monkeypatch.setattr(torch, "compile", torch_compile)
    defence = carso_task("pipeline").trained.eval()
    fast = defence.make_frozen_copy(torch.float32, compile=True, plain=False)
    given = batch(1)

    def attacked() -> Tensor:
        return pgd(fast, given.x, given.y, 0.1, steps=3, random_start=False)

    fresh = [attacked() for _ in range(3)]
    assert compiled(fast)
    assert not torch.equal(fresh[1], fresh[2])
    for mode in (fast.fixed_noise(7), fast.deterministic()):
        with mode:
            assert torch.equal(attacked(), attacked())
