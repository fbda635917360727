"""What is captured, when, and what is replayed; CUDA graphs are stood for by functions that are run again."""

import argparse
import gc
import random
import re
import types
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from small_runs import same
from torch import Tensor, nn

from purify_fast.model_state import describe
from purify_fast.speed.graphs import graphed_loop, graphed_loop as step_graphs
from purify_fast.speed.graphs.graphed_loop import StepGraphs
from purify_fast.speed.graphs.step_loop import State, Steps, begin_steps

pytestmark = pytest.mark.usefixtures("one_thread")
#: Steps of a loop.
STEPS = 40


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 2.0), requires_grad=False)
        self.power = 1

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight**self.power


@dataclass(frozen=True)
class Grow:
    """x <- model(x), and the x before it is kept."""

    model: nn.Module

    def __call__(self, state: State) -> State:
        return {"x": self.model(state["x"]), "before": state["x"]}


def start(n: int = 3) -> State:
    return {"x": torch.arange(1.0, n + 1), "before": torch.zeros(n)}


def run(graphs: StepGraphs | None, model: nn.Module, steps: int = 3, state: State | None = None, kind=Grow) -> State:
    loop = begin_steps(graphs, kind(model), start() if state is None else state)
    for _ in range(steps):
        loop.advance()
    return loop.values()


@pytest.fixture
def graphs(rerun) -> StepGraphs:
    """Captures at once."""
    return StepGraphs("always", capture=rerun)


def test_a_replay_gives_what_the_eager_loop_gives(graphs, rerun):
    model, begin = Scale(), start()
    wanted = run(None, model, STEPS, begin)
    found = run(graphs, model, STEPS, begin)
    assert rerun.recorded == 1 and rerun.replayed == STEPS and graphs.refusal is None
    # what is another buffer before the step (here the old x) is read before any buffer is written
    assert same(found, wanted)
    assert float(found["x"][0]) == 2.0**STEPS and float(found["before"][0]) == 2.0 ** (STEPS - 1)
    assert same(begin, start())
    again = run(graphs, model, STEPS, begin)
    assert rerun.recorded == 1 and same(again, wanted) and same(found, wanted)


class Turned(Scale):
    """Its images lie in memory in another order than those that it gets at first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).t().contiguous().t()


def test_a_loop_is_captured_midway_and_gives_what_the_eager_loop_gives(rerun, monkeypatch):
    monkeypatch.setattr(graphed_loop, "CAPTURE_STEPS", 2)
    graphs, model = StepGraphs(capture=rerun), Turned()
    state = {"x": torch.arange(6.0).view(2, 3), "before": torch.zeros(2, 3)}
    for replayed in (3, 8):
        assert same(run(graphs, model, 5, state), run(None, model, 5, state))
        assert rerun.recorded == 1 and rerun.replayed == replayed and float(state["x"].sum()) == 15.0


def test_graphs_go_with_their_model_and_no_key_keeps_one_alive(graphs, rerun, monkeypatch):
    # the stand-in's replay would hold the model, as no CUDA graph does
    monkeypatch.setattr(rerun, "record", lambda run, device: run if run() else lambda: None)
    monkeypatch.setattr("purify_fast.speed.graphs.graphed_loop.nearly_as_exact", lambda *args: True)
    models = [Scale() for _ in range(4)]
    gone = [weakref.ref(model) for model in models]
    graphs.mode = "auto"
    for model in models:
        run(graphs, model, STEPS)
        # this is launched, and remembered
        run(graphs, model, 1, start(5))
    refused = of("Widening", lambda x: x.double())()
    run(graphs, refused, STEPS)
    gone.append(weakref.ref(refused))
    assert len(graphs) == 4 and graphs.refusal is not None
    del model, refused
    models.clear()
    gc.collect()
    assert [one() for one in gone] == [None] * 5
    run(graphs, Scale(), 1)
    assert len(graphs) == 0


def test_memory_that_ends_is_tried_once_more_without_graphs(rerun, caplog):
    graphs, model = StepGraphs("always", capture=rerun), Scale()
    cpu, drawn = torch.device("cpu"), []

    def work(fails: int):
        def attempt() -> State:
            drawn.append(float(torch.rand(1)))
            found = run(graphs, model, 3)
            if len(drawn) <= fails:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

        return attempt

    assert same(graphs.retry_without_graphs(work(1), cpu), run(None, model, 3))
    assert len(drawn) == 2 and drawn[0] == drawn[1] and rerun.released == 1
    assert graphs.mode == "off" and len(graphs) == 0 and rerun.recorded == 1
    assert "the CUDA graphs of attacks are dropped" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        graphs.retry_without_graphs(work(9), cpu)
    assert len(drawn) == 3


CHANGES = {
    "values": lambda model: model.weight.data.fill_(0.5),
    "weight": lambda model: setattr(model, "weight", nn.Parameter(torch.full((1,), 3.0), requires_grad=False)),
    "setting": lambda model: setattr(model, "power", 2),
    "mode": lambda model: model.eval(),
    "hook": lambda model: model.register_forward_hook(lambda module, args, output: output + 1),
    "part": lambda model: setattr(model, "part", nn.Linear(1, 1)),
    "autocast": lambda model: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_else_the_model_computes_with_makes_another_graph(graphs, rerun, change):
    model = Scale()
    run(graphs, model, STEPS)
    CHANGES[change](model)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert same(run(graphs, model, STEPS), run(None, model, STEPS))
    assert rerun.recorded == (1 if change == "values" else 2)


def test_every_shape_has_its_graph_and_the_least_recently_used_one_goes(rerun, monkeypatch):
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 2)
    graphs, model = StepGraphs(capture=rerun), Scale()
    for size, recorded in ((3, 1), (4, 2), (3, 2), (5, 3), (3, 3), (4, 4)):
        assert same(run(graphs, model, STEPS, start(size)), run(None, model, STEPS, start(size)))
        assert rerun.recorded == recorded and len(graphs) <= 2


def of(name: str, forward) -> type[Scale]:
    """A class of models that compute what ``forward`` says."""
    return type(name, (Scale,), {"forward": lambda self, x: forward(x)})


Waiting = of("Waiting", lambda x: x * 2 if float(x.sum()) > 0 else x)


class FailsInTheTrial(Scale):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        FailsInTheTrial.calls += 1
        if FailsInTheTrial.calls == STEPS + 2:
            raise KeyError("the second call")
        return super().forward(x)


class Shard(Tensor):
    pass


class DrawsFromItsOwn(Scale):
    def __init__(self):
        super().__init__()
        self.own = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.own.random() / 1000)


class Sharded(Scale):
    def __init__(self):
        super().__init__()
        self.part = torch.ones(2).as_subclass(Shard)


NOT_CAPTURED = [
    (Waiting, "the step waits for the device in operator _local_scalar_dense"),
    (of("Masked", lambda x: x + x[x > 1].sum()), "the step waits for the device in operator index"),
    (of("Widening", lambda x: x.double()), r"changes x from \(torch.float32, \[3\], .*to \(torch.float64, \[3\]"),
    (of("DrawsInPython", lambda x: x * random.random()), "the step draws random numbers on the host"),
    (of("DrawsInNumpy", lambda x: x * float(np.random.rand())), "the step draws random numbers on the host"),
    (FailsInTheTrial, r"the step cannot be captured \(KeyError: 'the second call'\)"),
    (Sharded, "a tensor of type Shard does not say where its memory is"),
]


@pytest.mark.parametrize(("kind", "reason"), NOT_CAPTURED)
def test_what_cannot_be_captured_runs_eagerly_and_says_why_once(graphs, rerun, kind, reason):
    model = kind()
    states = random.getstate(), np.random.get_state()[1].copy()
    with pytest.warns(UserWarning, match="an attack runs without a CUDA graph: ") as warned:
        for _ in range(3):
            random.seed(1), np.random.seed(1)
            wanted = run(None, model, STEPS)
            random.seed(1), np.random.seed(1)
            assert same(run(graphs, model, STEPS), wanted)
    random.setstate(states[0])
    assert rerun.recorded == 0 and len(warned) == len(graphs.refusals) == 1
    assert re.search(reason, graphs.refusal) and re.search(reason, str(warned[0].message))


def test_a_step_that_draws_from_a_generator_of_its_own_is_not_captured(graphs):
    with pytest.warns(UserWarning, match="the step draws random numbers on the host"):
        captured = run(graphs, DrawsFromItsOwn(), STEPS)
    # Its generator is where it would be without a trial.
    assert same(captured, run(None, DrawsFromItsOwn(), STEPS)) and len(graphs) == 0


def test_a_function_and_another_device_run_eagerly(graphs, rerun):
    assert same(run(graphs, lambda x: 2 * x, STEPS), run(None, lambda x: 2 * x, STEPS))
    assert "not a torch.nn.Module" in graphs.refusal
    off, elsewhere = StepGraphs("off", capture=rerun), StepGraphs()
    for other in (off, elsewhere):
        run(other, Scale(), STEPS)
        assert other.refusal is None
    assert rerun.recorded == 0


def test_counters_count_replays_and_no_warm_up(graphs, rerun):
    class Counting(Scale):
        images, not_dependencies = 0, frozenset({"images"})

        def counted(self) -> int:
            return self.images

        def count(self, images: int) -> None:
            self.images += images

        def forward(self, x: Tensor) -> Tensor:
            # a graph launches what this launches, and does not run it
            self.images += 0 if rerun.replaying else len(x)
            return super().forward(x)

    eager, captured = Counting(), Counting()
    run(None, eager, STEPS), run(graphs, captured, STEPS), run(graphs, captured, STEPS)
    assert rerun.recorded == 1 and 2 * eager.images == captured.images == 6 * STEPS


def test_a_replay_that_gives_something_else_is_not_used(graphs, rerun, monkeypatch):
    record = rerun.record
    monkeypatch.setattr(rerun, "record", lambda run, device: record(lambda: None, device))
    model = Scale()
    assert same(run(graphs, model, STEPS), run(None, model, STEPS))
    assert "a replay gives another result than the step" in graphs.refusal and len(graphs) == 0


def test_two_loops_over_one_step_do_not_mix(graphs, rerun):
    model, twice = Scale(), start() | {"x": torch.full((3,), 5.0)}
    run(graphs, model, STEPS)
    first = begin_steps(graphs, Grow(model), start())
    first.advance()
    second = begin_steps(graphs, Grow(model), twice)
    assert second.captured is not None and first.captured is None
    second.advance()
    for _ in range(2):
        first.advance(), second.advance()
    assert same(first.values(), run(None, model, 3)) and same(second.values(), run(None, model, 3, twice))
    del first, second
    before = rerun.replayed
    run(graphs, model, STEPS)
    assert rerun.replayed == before + STEPS and rerun.recorded == 1


@dataclass
class Settings:
    factor: float = 1.0
    weight: torch.Tensor | None = None


class Opaque:
    factor = 1.0


def grow(settings):
    settings.factor = 2.0


def write(settings):
    settings.weight.fill_(1)


#: What a model has, how it is changed, and whether that makes it another model to a captured step.
DEPENDENCIES = {
    "a dataclass": (Settings, grow, True),
    "a namespace": (lambda: types.SimpleNamespace(factor=1.0), grow, True),
    "arguments": (lambda: argparse.Namespace(factor=1.0), grow, True),
    "an object of a user's class": (Opaque, grow, True),
    "an object in a list": (lambda: [Opaque()], lambda held: grow(held[0]), True),
    "another type": (lambda: Settings(1), lambda s: setattr(s, "factor", True), True),
    "a number that is none": (lambda: Settings(float("nan")), lambda s: setattr(s, "factor", float("nan")), False),
    "a tensor that is written to": (lambda: Settings(weight=torch.zeros(2)), write, False),
    "another tensor": (lambda: Settings(weight=torch.zeros(2)), lambda s: setattr(s, "weight", torch.zeros(2)), True),
    # a slice cannot be hashed before Python 3.12: it counts by its bounds
    "a slice": (lambda: Settings(slice(0, 3)), lambda s: setattr(s, "factor", slice(0, 3, 1)), True),
    "an equal slice": (lambda: Settings(slice(0, 3)), lambda s: setattr(s, "factor", slice(0, 3)), False),
    "a class": (lambda: Settings(Opaque), lambda s: setattr(s, "factor", Settings), True),
    "the order of parts": (lambda: [nn.Linear(2, 2), nn.Linear(2, 2)], lambda parts: parts.reverse(), True),
}


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_what_a_captured_step_depends_on(name):
    make, change, seen = DEPENDENCIES[name]
    model = nn.Linear(2, 2)
    model.settings = make()
    # The tensors are kept alive: another one could get the address of one that is gone.
    before = describe(model)
    change(model.settings)
    # a key is looked up in a table
    assert (describe(model).key != before.key) is seen and hash(before.key) is not None


def test_the_tensors_that_a_graph_reads_stay_alive(graphs):
    """A model may get other tensors later, while its graph is kept."""
    hidden = {"scale": torch.full((1,), 3.0)}
    model = Scale()
    model.forward = lambda x: x * hidden["scale"]
    run(graphs, model, STEPS)
    (captured,) = graphs._captured.values()
    address = hidden.pop("scale").data_ptr()
    assert address in [one.data_ptr() for one in captured.objects if isinstance(one, Tensor)]


def test_an_empty_batch_is_no_reason_to_capture_or_to_fail(rerun):
    class Refuses(Scale):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 0:
                raise ValueError("no images")
            return super().forward(x)

    loop = begin_steps(StepGraphs("always", capture=rerun), Grow(Refuses()), start(0))
    assert rerun.recorded == 0 and type(loop) is Steps


class Verified(Scale):
    """Waits at its first call only, as where a kernel is verified."""

    def __init__(self):
        super().__init__()
        self.checked: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.checked:
            assert float(x.sum()) > 0
            self.checked.add(len(x))
        return super().forward(x)


def test_what_waits_at_its_first_call_alone_is_captured(graphs, rerun):
    model = Verified()
    found = run(graphs, model, STEPS)
    assert rerun.recorded == 1 and same(found, run(None, Verified(), STEPS))


def test_a_capture_that_fails_leaves_the_eager_loop(graphs, rerun):
    model, rerun.error = Scale(), RuntimeError("operation not permitted\nwhen stream is capturing")
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            assert same(run(graphs, model, STEPS), run(None, model, STEPS))
    reason = "the step cannot be captured (RuntimeError: operation not permitted)"
    assert [str(one.message) for one in warned] == [f"an attack runs without a CUDA graph: {reason}"]
    rerun.error = None
    run(graphs, model, STEPS)
    assert rerun.recorded == 0 and graphs.refusal == reason, "what failed is not tried again"
    run(graphs, model, STEPS, start(4))
    assert rerun.recorded == 1 and graphs.refusal is None
