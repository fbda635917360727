"""When a step is captured, on a simulated clock that goes by times of steps on a GPU."""

import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from purify_fast.speed import StepGraphs
from purify_fast.speed.graphs.step_loop import CAPTURE_STEPS, LaunchCost

SIZES = (16, 64, 250)
Times = dict[int, tuple[float, float]]
#: Seconds of a step, launched and replayed, by the attack and the number of images. They are modelled for a ResNet-18
#: on an H100; those of PGD were measured on an H200, in bfloat16.
TIMES: dict[str, Times] = {
    "APGD-100 ce": {16: (1.4e-3, 0.189e-3), 64: (1.4e-3, 0.414e-3), 250: (1.57e-3, 1.57e-3)},
    "APGD-T 100": {16: (1.65e-3, 0.211e-3), 64: (1.65e-3, 0.414e-3), 250: (1.65e-3, 1.57e-3)},
    "FAB-T 100": {16: (1.57e-3, 0.31e-3), 64: (1.57e-3, 0.42e-3), 250: (1.6e-3, 1.6e-3)},
    "PGD measured": {16: (4.01e-3, 0.61e-3), 64: (4.04e-3, 1.11e-3), 250: (4.2e-3, 2.88e-3)},
}
#: The steps that each attack takes of a batch.
STEPS = 100
#: The seconds of a capture besides the steps that it tries, so that a capture of PGD takes what was measured.
RECORD = 0.02
#: The seconds of a capture of PGD that were measured on the H200, by the number of images.
MEASURED = {16: 0.050, 64: 0.051, 250: 0.059}


@dataclass(eq=False)
class Device:
    """A GPU that computes nothing: steps, replays and captures move its clock."""

    times: Times
    kind = "cpu"
    seconds: float = 0.0
    replaying: bool = False
    captures: int = 0

    def aside(self, device):
        return contextlib.nullcontext()

    def clock(self) -> float:
        return self.seconds

    def now(self, device) -> float:
        return self.seconds

    def timed(self, run, device) -> tuple[float, float]:
        begun = self.seconds
        run()
        return self.seconds - begun, self.seconds - begun

    def record(self, run, device):
        self.captures += 1
        self.seconds += RECORD
        run()

        def replay() -> None:
            self.replaying = True
            run()
            self.replaying = False

        return replay


@dataclass(frozen=True)
class Step:
    model: nn.Module
    device: Device = field(compare=False)

    def __call__(self, state):
        self.device.seconds += self.device.times[len(state["x"])][self.device.replaying]
        return {"x": state["x"]}


def simulated(times: Times, order, steps: int = STEPS, mode="auto") -> Device:
    """Attack batches of these sizes, one after the other."""
    device = Device(times)
    graphs, step = StepGraphs(mode, capture=device), Step(nn.Identity(), device)
    for size in order:
        loop = graphs.begin(step, {"x": torch.zeros(size)})
        for _ in range(steps):
            loop.take()
    return device


def cost_of(times: Times, size: int) -> float:
    return simulated(times, [size], 0, "always").seconds


def best(times: Times, order) -> float:
    """Seconds of the best choice, which knows at the beginning how many steps will be taken of each size."""
    taken = {size: STEPS * count for size, count in Counter(order).items()}
    return sum(
        min(steps * times[size][0], cost_of(times, size) + steps * times[size][1]) for size, steps in taken.items()
    )


def orders() -> list[tuple[int, ...]]:
    """Every order of two batches of each size."""
    return sorted(set(itertools.permutations(2 * SIZES)))


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
def test_any_order_of_batches_ends_within_half_more_than_the_best_choice(times, one_thread):
    assert set(times) == set(SIZES) and len(orders()) == 90
    wanted = best(times, orders()[0])
    found = [simulated(times, order) for order in orders()]
    assert max(device.seconds for device in found) <= 1.5 * wanted
    # each size is captured once, also where that turns out to save nothing
    assert {device.captures for device in found} == {3}


def test_launches_pay_for_a_capture_once_they_have_cost_as_much():
    launched = LaunchCost()
    assert not launched.pays(0.0)
    # the first launch compiles
    for seconds in (5.0, 0.25, 0.5):
        assert not launched.pays(1.0)
        launched.count(seconds)
    launched.count(0.25)
    assert launched.steps == 4 and launched.pays(1.0) and not launched.pays(1.01)
    assert not LaunchCost(1000, 1.0, refusal="it waits for the device").pays(1.0)
    assert not LaunchCost(1000, 1.0, refusal="it waits for the device").pays(None)


@pytest.mark.parametrize("eager", [0.001, 0.003, 1.0])
def test_a_loop_goes_on_as_replays_when_its_launches_have_paid(eager):
    """Before the first capture, a capture is assumed to cost an estimate, on slow and on fast hosts."""
    times = {4: (eager, eager / 10)}
    assert simulated(times, [4], CAPTURE_STEPS).captures == 0
    device = simulated(times, [4], CAPTURE_STEPS + 1)
    assert device.captures == 1
    assert device.seconds == pytest.approx(CAPTURE_STEPS * eager + cost_of(times, 4) + eager / 10)


@pytest.mark.parametrize("images", SIZES)
def test_the_estimate_is_a_capture_as_it_was_measured(images):
    times = TIMES["PGD measured"]
    assert cost_of(times, images) == pytest.approx(MEASURED[images], rel=0.05)
    assert CAPTURE_STEPS * times[images][0] == pytest.approx(MEASURED[images], rel=0.25)


@pytest.mark.parametrize(("replay", "captures"), [(0.0019, 1), (0.0017, 2)])
def test_where_a_replay_saves_less_than_a_tenth_nothing_is_captured_again(replay, captures):
    """In another mode the model is another one, with graphs of its own."""
    device = Device({4: (0.002, replay)})
    graphs, model = StepGraphs(capture=device), nn.Identity()
    for training in (True, False):
        loop = graphs.begin(Step(model.train(training), device), {"x": torch.zeros(4)})
        for _ in range(2000):
            loop.take()
    assert device.captures == captures == len(graphs) + (replay == 0.0019)
    assert (graphs.refusal == "a replay saves less than a tenth of the step") == (captures == 1)
    always = StepGraphs("always", capture=Device({4: (0.002, replay)}))
    assert always.begin(Step(model, always.capture), {"x": torch.zeros(4)}).replays


def test_the_least_measured_cost_of_a_capture_counts():
    device = Device({4: (0.002, 0.0001), 5: (0.2, 0.0001), 6: (0.001, 0.0001)})
    graphs, step = StepGraphs(capture=device), Step(nn.Identity(), device)
    assert graphs.cost is None
    costs = []
    for size in device.times:
        loop = graphs.begin(step, {"x": torch.zeros(size)})
        for _ in range(100):
            loop.take()
        costs.append(cost_of(device.times, size))
        assert len(graphs) == len(costs) and graphs.cost == pytest.approx(min(costs))
    assert costs[1] > costs[0] > costs[2]


def test_a_dropped_graph_is_paid_for_again(monkeypatch):
    monkeypatch.setattr("purify_fast.speed.graphs.step_graphs.MOST_GRAPHS", 1)
    device = Device({4: (0.002, 0.0001), 5: (0.002, 0.0001)})
    graphs, step = StepGraphs(capture=device), Step(nn.Identity(), device)
    for size, captures in ((4, 1), (5, 2), (4, 2), (4, 3)):
        loop = graphs.begin(step, {"x": torch.zeros(size)})
        # 18 launches cost more than a capture of 35 ms
        for _ in range(25 if captures > device.captures else 5):
            loop.take()
        assert device.captures == captures
