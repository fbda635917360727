"""Which form of a step is captured, when the forms are compared, and that a wrong form never serves."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from captures import Rerun
from torch import Tensor, nn

from purify_fast.attacks import pgd
from purify_fast.attacks.objective import GradientStep, Objective
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops.dispatch import records
from purify_fast.speed import InferenceCopy, StepGraphs
from purify_fast.speed.graphs import step_forms
from purify_fast.speed.graphs.step_forms import FORMS, agrees, candidates, copies_in, make_form
from purify_fast.zoo import load

pytestmark = pytest.mark.usefixtures("one_thread")


class TimedForms(Rerun):
    """Stands for a GPU on which a replay of each form takes the given milliseconds."""

    def __init__(self, times: dict[str, float], monkeypatch):
        super().__init__()
        self.by_form, self.made, self.cost = {form: 1e-3 * time for form, time in times.items()}, list[str](), 7.0
        original = step_forms.make_form

        def make(form, *given):
            self.made.append(form)
            return original(form, *given)

        monkeypatch.setattr("purify_fast.speed.graphs.step_graphs.make_form", make)

    def record(self, run, device):
        self.replay_time = self.by_form[self.made[-1]]
        return super().record(run, device)


@pytest.fixture(autouse=True)
def own_files(tmp_path, monkeypatch):
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path))
    # A CPU with matrix tiles has fused convolutions, so its steps would have one more form.
    monkeypatch.setattr("purify_fast.speed.folding.convolution_chains.has_tiles", lambda: False)
    # The real compiler would take most of the time of these tests, and changes no decision.
    monkeypatch.setattr(step_forms, "BACKEND", "aot_eager")
    monkeypatch.setattr("purify_fast.speed.folding.inference_copy.keeps_sizes", lambda device: True)
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile(function, **{**options, "backend": "aot_eager"})
    )
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


def attack(model: nn.Module, graphs: StepGraphs | None, images: int = 8, steps: int = 4) -> Tensor:
    x = torch.rand(images, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"eps": 8 / 255, "alpha": 2 / 255, "steps": steps, "random_start": False, "graphs": graphs}
    return pgd(model, x, torch.arange(images) % 10, **options)


def inference_copy(width: int = 4) -> InferenceCopy:
    return InferenceCopy(network(width), (3, 8, 8), torch.bfloat16)


TIMES = {"launched": 3.0, "compiled": 2.0, "joint": 1.0}


def test_the_fastest_form_is_taken_and_kept_on_disk(monkeypatch):
    model, capture = inference_copy(), TimedForms(TIMES, monkeypatch)
    graphs = StepGraphs("always", capture, choose_after=0.0)
    first = attack(model, graphs)
    assert capture.made == ["launched"]
    second = attack(model, graphs)
    assert capture.made == ["launched", "launched", "compiled", "joint"]
    (captured,) = graphs._captured.values()
    assert captured.form == "joint" and captured.final and captured.seconds == 1e-3
    # The forms are not compared again.
    third = attack(model, graphs)
    assert len(capture.made) == 4 and torch.equal(second, third)
    assert (first - third).abs().max() <= 2 * 8 / 255 and ((first - third).abs() > 1e-6).float().mean() < 0.1
    (entry,) = json.loads(records.file_of("formed", torch.device("cpu")).read_text())["ops"].values()
    assert entry["form"] == "joint" and entry["milliseconds"] == TIMES


def test_a_later_run_takes_the_known_form_when_it_is_worth_its_cost(monkeypatch):
    model, capture = inference_copy(), TimedForms(TIMES, monkeypatch)
    graphs = StepGraphs("always", capture, choose_after=0.0)
    attack(model, graphs)
    attack(model, graphs)
    later = TimedForms(TIMES, monkeypatch)
    later.cost = 0.0
    graphs = StepGraphs("always", later)
    attack(copy.deepcopy(model), graphs)
    # The same structure, but another object: nothing was captured for it, and a short run compiles nothing.
    assert later.made == ["launched"]
    (captured,) = graphs._captured.values()
    # Making the joint form took one capture, which is 7 seconds in this stand-in.
    assert not captured.final and captured.known == ("joint", 7.0)
    captured.replays = int(7.0 / captured.seconds) - 10
    attack(captured.model(), graphs)
    assert later.made == ["launched"]
    captured.replays = int(7.0 / captured.seconds) + 1
    attack(captured.model(), graphs)
    assert later.made == ["launched", "joint"]
    (captured,) = graphs._captured.values()
    assert captured.form == "joint" and captured.final


@pytest.mark.slow
@pytest.mark.parametrize("change", ["model", "batch", "version", "setting"])
def test_another_model_batch_version_or_setting_is_compared_again(monkeypatch, change):
    model, capture = inference_copy(), TimedForms(TIMES, monkeypatch)
    graphs = StepGraphs("always", capture, choose_after=0.0)
    attack(model, graphs)
    attack(model, graphs)
    facts = records.machine(torch.device("cpu"))
    if change == "version":
        monkeypatch.setattr(records, "machine", lambda device: {**facts, "torch": "3.0.0"})
    if change == "setting":
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    images = 5 if change == "batch" else 8
    model = inference_copy(6 if change == "model" else 4)
    again = TimedForms({"launched": 1.0, "compiled": 2.0, "joint": 3.0}, monkeypatch)
    graphs = StepGraphs("always", again, choose_after=0.0)
    attack(model, graphs, images)
    attack(model, graphs, images)
    assert again.made == ["launched", "launched", "compiled", "joint"]
    assert [captured.form for captured in graphs._captured.values()] == ["launched"]


def test_forms_are_compared_when_replays_have_taken_as_long(monkeypatch):
    model, capture = inference_copy(), TimedForms(TIMES, monkeypatch)
    graphs = StepGraphs("always", capture)
    for _ in range(3):
        attack(model, graphs)
    (captured,) = graphs._captured.values()
    assert capture.made == ["launched"] and captured.replays == 12
    captured.replays = int(60.0 / captured.seconds)
    attack(model, graphs)
    assert set(capture.made) == {"launched", "compiled", "joint"}
    # The comparison took three captures of 7 seconds. So another batch size is compared after 21 seconds.
    assert graphs._choice_costs == [21.0]


def test_a_wrong_form_never_serves(monkeypatch, caplog):
    model, capture = inference_copy(), TimedForms({**TIMES, "compiled": 0.5}, monkeypatch)
    original = step_forms._joint

    def wrong(function, buffers):
        made = original(function, buffers)

        def run(state):
            new = made.run(state)
            # It moves the images against the gradient.
            return {**new, "point": 2 * state["point"] - new["point"]} if "point" in new else new

        return made._replace(run=run)

    monkeypatch.setattr(step_forms, "_joint", wrong)

    def fails(function):
        raise ValueError("no compiler here")

    monkeypatch.setattr(step_forms, "_compiled", fails)
    graphs = StepGraphs("always", capture, choose_after=0.0)
    with caplog.at_level("INFO", logger="purify_fast"):
        first = attack(model, graphs)
        again = attack(model, graphs)
    assert torch.equal(first, again) and graphs.refusal is None
    assert [captured.form for captured in graphs._captured.values()] == ["launched"]
    assert "no form 'compiled' (ValueError: no compiler here)" in caplog.text
    assert "the form 'joint' of a step gives another result" in caplog.text


def test_deterministic_algorithms_compare_no_forms(monkeypatch):
    model, capture = inference_copy(), TimedForms(TIMES, monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        graphs = StepGraphs("always", capture, choose_after=0.0)
        attack(model, graphs)
        attack(model, graphs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert capture.made == ["launched"]


@pytest.mark.parametrize("form", ["compiled", "joint"])
def test_a_form_uses_weights_that_change_in_place(monkeypatch, form):
    """A training changes the weights between two replays."""
    model = inference_copy()
    times = {**TIMES, form: 0.1}
    capture = TimedForms(times, monkeypatch)
    graphs = StepGraphs("always", capture, choose_after=0.0)
    attack(model, graphs)
    attack(model, graphs)
    assert [captured.form for captured in graphs._captured.values()] == [form]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1)
    found, wanted = attack(model, graphs), attack(model, None)
    assert [captured.form for captured in graphs._captured.values()] == [form]
    assert ((found - wanted).abs() > 1e-6).float().mean() < 0.1


def test_a_caller_under_autocast_gets_the_joint_form_in_the_same_precision():
    model = InferenceCopy(network(), (3, 8, 8), torch.float32)
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    step = GradientStep(Objective(model, "ce"))
    zeros = torch.zeros(8)
    state = {"point": x, "y": torch.arange(8), "image": torch.zeros_like(x), "loss": zeros, "wrong": zeros}
    with torch.autocast("cpu", torch.bfloat16):
        wanted, made = step(state), make_form("joint", step, state)
        found = made.run(state)
    assert torch.allclose(found["image"], wanted["image"], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_many_compiled_forms_in_a_process_are_all_compiled():
    """PyTorch compiles the code of a function only eight times."""
    model, graphs = inference_copy(), torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    with torch.no_grad():
        for size in range(8, 20):
            form = make_form("compiled", Noisy(model), {"x": torch.zeros(size, 3, 8, 8)})
            (_, region), *_ = form.objects
            region(torch.rand(size, 3, 8, 8))
    assert graphs["unique_graphs"] - before == 12


class Shaken(nn.Module):
    """A model that draws random numbers on the device."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x + 1e-3 * torch.rand_like(x))


def test_a_random_model_has_no_compiled_forms(monkeypatch):
    capture = TimedForms(TIMES, monkeypatch)
    graphs, model = StepGraphs("always", capture, choose_after=0.0), Shaken(inference_copy()).eval()
    attack(model, graphs)
    attack(model, graphs)
    assert set(capture.made) == {"launched"} and graphs.refusal is None


@dataclass(frozen=True)
class Noisy:
    model: nn.Module

    def __call__(self, state):
        return {"x": self.model(state["x"]) + torch.rand_like(state["x"])}


def test_a_step_that_draws_random_numbers_has_no_joint_form():
    with pytest.raises(RuntimeError, match="draws random numbers in the operator aten"):
        make_form("joint", Noisy(nn.Identity()), {"x": torch.zeros(3)})


def test_the_candidates_follow_the_parts_of_a_model():
    assert candidates(Noisy(nn.Linear(2, 2))) == ["launched", "joint"]
    assert candidates(Noisy(inference_copy())) == ["launched", "compiled", "joint"]
    compiled = InferenceCopy(network(), (3, 8, 8), torch.bfloat16, compile=True)
    assert candidates(Noisy(nn.Sequential(compiled))) == ["launched"]
    assert set(TIMES) | {"unfused"} == set(FORMS)


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
@pytest.mark.parametrize("name", ["digits-standard", "digits-pgd-at", "digits-arrest"])
def test_the_compilers_forms_agree_on_the_models_of_the_zoo(monkeypatch, name):
    """With Inductor itself: the same logits within the tolerance of a copy, and the same direction."""
    monkeypatch.undo()
    model = load(name)
    shape = (1, 16, 16)
    made = InferenceCopy(getattr(model, "classifier", model), shape, torch.bfloat16)
    assert copies_in(made) == [made]
    x = torch.rand(16, *shape, generator=torch.Generator().manual_seed(3))
    y = made(x).argmax(1)
    step = GradientStep(Objective(made, "ce"))
    state = {"point": x, "y": y, "image": torch.zeros_like(x), "loss": torch.zeros(16), "wrong": torch.zeros(16)}
    wanted = step(state)
    for form in ("compiled", "joint"):
        got = make_form(form, step, state).run(state)
        assert agrees(got, wanted, state)
        assert (got["loss"] - wanted["loss"]).abs().max() <= 0.05 * wanted["loss"].abs().max()
