"""Trainings with captured steps: the same bits as without, on a CPU where a function stands for a graph."""

import copy
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest
import small_runs
import torch
from captures import Tape
from cuda_launches import CudaLaunches
from small_runs import EPS, SHAPE, arrest_task, atop_task, attack, batch, carso_task, classifier_task, diffusion_task
from torch import nn

from purify_fast import _library
from purify_fast.models import SmallCNN
from purify_fast.ops import use_backend
from purify_fast.speed import StepGraphs
from purify_fast.speed.graphs.step_loop import CAPTURE_STEPS
from purify_fast.training import Batch, ClassifierConfig, ClassifierTask, FitConfig, Task, TrainingAttack, fit
from purify_fast.training.captured_step import (
    REPEATS,
    CapturedStep,
    NotRestored,
    change_weights,
    undone,
    within_repeats,
)
from purify_fast.training.loop import step_settings, train_step
from purify_fast.training.optimizers import fuse


def arrest(precision: str = "float32", steps: int = 3, norm: str = "linf", **options) -> Task:
    return arrest_task(attack=attack(steps=steps, norm=norm), precision=precision, **options)


def carso(target: str, precision: str = "float32", steps: int = 3) -> Task:
    return carso_task(target, attack=attack(steps=steps), precision=precision)


def classifier() -> Task:
    return classifier_task(attack=attack(steps=3))


def own(kind: type[ClassifierTask], **options) -> Task:
    """A training of a class of its own."""
    torch.manual_seed(0)
    return kind(SmallCNN(width=4), ClassifierConfig(attack=attack(**options)))


#: Each training, and its updates in a step, each of which is a graph.
TASKS = {
    "classifier": (classifier, 1),
    "ARREST": (arrest, 1),
    "ARREST, l1": (lambda: arrest(norm="l1", replay=False), 1),
    "ARREST, bfloat16, no replay": (lambda: arrest("bfloat16", replay=False), 1),
    "CARSO": (lambda: carso("classifier"), 1),
    "CARSO, pipeline": (lambda: carso("pipeline"), 1),
    "AToP": (lambda: atop_task("classifier"), 1),
    "AToP, pipeline": (lambda: atop_task("pipeline", 3), 1),
    "AToP, GAN": (lambda: atop_task("classifier", gan_grad=True), 2),
    "AToP, pipeline, bfloat16": (lambda: atop_task("pipeline", 3, precision="bfloat16"), 1),
    "CARSO, pipeline, bfloat16": (lambda: carso("pipeline", "bfloat16"), 1),
    "diffusion": (diffusion_task, 1),
}


def trained(task: Task, graphs: StepGraphs | None, batches: list[Batch]) -> tuple[list[float], dict]:
    task.graphs, losses = graphs, []
    for one in batches:
        torch.manual_seed(one.seed)
        losses.append(float(train_step(task, one)["loss"]))
    return losses, task.model.state_dict()


def weights(make: Callable[[], Task], run: Callable[[Task], object], graphs: StepGraphs) -> Iterator[dict]:
    """The weights of a task after it has run without graphs, and after it has run with these."""
    for given in (None, graphs):
        task = make()
        task.graphs = given
        run(task)
        yield task.model.state_dict()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.endswith("bfloat16") else ()) for name in TASKS]
)
def test_captured_steps_train_the_same_weights(tape, name):
    make, updates = TASKS[name]
    batches = [batch(1), batch(2), batch(3)]
    wanted, found = trained(make(), None, batches), trained(make(), StepGraphs("always", capture=tape), batches)
    assert wanted[0] == found[0] and small_runs.same(wanted[1], found[1])
    assert tape.recorded == updates and tape.replayed == 3 * updates


class Stale(Tape):
    """A replay computes, and then one weight has another gradient than the step."""

    def record(self, run, device):
        replay = super().record(run, device)

        def wrong():
            replay()
            self.weight.grad.mul_(2)

        return wrong


@pytest.mark.parametrize("why", ["own task", "no capture", "wrong replay", "bank"])
def test_steps_that_are_not_captured_train_the_same_weights(tape, why):
    batches = [batch(1), batch(2)]
    if why == "bank":
        batches = [replace(one, bank=object()) for one in batches]
    wanted, task = trained(arrest(), None, batches), arrest()
    if why == "own task":
        task.captures = lambda batch: None
    if why == "wrong replay":
        tape = Stale()
        tape.weight = task.classifier.conv1.weight
    if why == "no capture":
        tape.error = RuntimeError("no memory")
    found = trained(task, StepGraphs("always", capture=tape), batches)
    assert wanted[0] == found[0] and small_runs.same(wanted[1], found[1])
    assert not any(isinstance(step, CapturedStep) for step in task.graphs.whole_steps.values())


class Rounding(ClassifierTask):
    """Its gradients differ a little in each call, like those of a kernel that adds in another order."""

    captures = ClassifierTask.captures

    def training_step(self, batch):
        loss, metrics = super().training_step(batch)
        return loss * (1 + random.Random().choice([-1, 1]) * 1e-2), metrics


@pytest.mark.parametrize("doubled", [False, True])
def test_a_step_that_differs_from_itself_is_captured_but_not_with_a_wrong_gradient(tape, doubled, monkeypatch):
    task = own(Rounding)
    # Every other call is larger, so that two runs of the step differ.
    signs = itertools.cycle([1, -1])
    monkeypatch.setattr(random.Random, "choice", lambda self, given: next(signs))
    if doubled:
        tape = Stale()
        tape.weight = task.model.conv1.weight
    task.graphs = StepGraphs("always", capture=tape)
    if doubled:
        with pytest.warns(UserWarning, match="runs without a CUDA graph: RuntimeError: a replay gives another result"):
            train_step(task, batch(1))
    else:
        train_step(task, batch(1))
    steps = list(task.graphs.whole_steps.values())
    assert isinstance(steps[0], CapturedStep) is not doubled


def test_a_first_call_that_differs_excuses_no_wrong_gradient(monkeypatch):
    """The first call may verify kernels and choose algorithms."""
    task, tape = own(Rounding), Stale()
    signs = itertools.chain([500], itertools.repeat(1))
    monkeypatch.setattr(random.Random, "choice", lambda self, given: next(signs))
    tape.weight, task.graphs = task.model.conv1.weight, StepGraphs("always", capture=tape)
    with pytest.warns(UserWarning, match="a replay gives another result"):
        train_step(task, batch(1))


@pytest.mark.parametrize("method", ["equal", "copy_"])
def test_weights_are_restored_although_memory_ran_out(method, tape, monkeypatch):
    """A comparison has no memory for its result from the failure on. If nothing can be restored, the training ends."""
    task = arrest()
    task.model.register_buffer("seen", torch.zeros(3))
    before = copy.deepcopy(task.model.state_dict())

    def fail(*_):
        change_weights(task, 1.1)
        monkeypatch.setattr(torch.Tensor, method, mock.Mock(side_effect=RuntimeError("out of memory")))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(CapturedStep, "_record", fail)
    graphs, given = StepGraphs("always", capture=tape), batch(1)
    if method == "copy_":
        task.graphs = graphs
        with pytest.raises(NotRestored, match="out of memory"):
            train_step(task, given)
        return
    with pytest.raises(RuntimeError, match="out of memory"), undone(task, given.x.device):
        fail()
    monkeypatch.undo()
    assert small_runs.same(before, task)


def test_a_step_is_captured_when_many_like_it_have_occurred_and_serves_every_radius(rerun):
    task = classifier_task(attack=attack(steps=3, eps_warmup=0.3))
    task.graphs = StepGraphs("step", capture=rerun)
    for epoch in (0, 9):
        rerun.replayed = 0
        for seed in range(CAPTURE_STEPS + 3):
            train_step(task, replace(batch(seed), epoch=epoch))
        steps = [step for step in task.graphs.whole_steps.values() if isinstance(step, CapturedStep)]
        assert len(steps) == 1
    assert rerun.replayed == CAPTURE_STEPS + 3


HALF = {"precision": "bfloat16"}
#: Trainings whose radius, step length or weight of the KL term changes in every epoch, and their kinds of steps.
RISING = {
    "PGD-AT": (lambda **rise: classifier_task(attack=attack(**rise)), 1),
    "TRADES, alpha": (lambda **rise: classifier_task(objective="trades", attack=attack(alpha=EPS, **rise)), 1),
    "ARREST": (lambda **rise: arrest_task(attack=attack(**rise)), 2),
    "ARREST, bfloat16": (lambda **rise: arrest_task(attack=attack(**rise), **HALF), 2),
    "CARSO": (lambda **rise: carso_task(attack=attack(**rise), kl_delay=0.5, eps_mode="official_code"), 1),
    "CARSO, alpha, bfloat16": (lambda **rise: carso_task(attack=attack(alpha=EPS, **rise), **HALF), 1),
    "CARSO, pipeline, bfloat16": (lambda **rise: carso_task("pipeline", attack=attack(**rise), **HALF), 1),
    "AToP": (lambda **rise: atop_task(attack=attack(steps=10, **rise), cls_delay=2), 2),
    "AToP, bfloat16": (lambda **rise: atop_task(attack=attack(steps=10, **rise), **HALF), 1),
    "AToP, pipeline, bfloat16": (lambda **rise: atop_task("pipeline", attack=attack(**rise), **HALF, cls_delay=2), 2),
}


#: Those that every run has. The others are slow.
ALWAYS = {"PGD-AT", "ARREST, bfloat16", "CARSO", "AToP, bfloat16"}


@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in RISING])
def test_validations_and_rising_numbers_keep_the_captured_step(tape, name, monkeypatch):
    """Each epoch ends with a validation, which reads the frozen classifier's copy again."""
    make, kinds = RISING[name]
    x, y = (torch.rand(24, *SHAPE) * 255).to(torch.uint8), torch.arange(24) % 10
    made = []
    record = CapturedStep._record
    monkeypatch.setattr(CapturedStep, "_record", lambda self, *given: (made.append(self), record(self, *given))[1])
    graphs = StepGraphs("always", capture=tape)

    def run(task):
        fit(task, x, y, FitConfig(4, 8), progress=False, validation=(x[:8], y[:8]))

    assert small_runs.same(*weights(lambda: make(eps_warmup=1.0), run, graphs))
    assert len(made) == len(graphs.whole_steps) == kinds


class TwoAttacks(ClassifierTask):
    """A second attack of another radius follows. A graph would give it the numbers of the first."""

    captures = ClassifierTask.captures

    def training_step(self, batch):
        loss, metrics = super().training_step(batch)
        x = TrainingAttack(eps=3 * EPS, steps=2).run(self.model, batch, graphs=self.graphs)
        return loss + self.model(x).square().mean(), metrics


def test_a_second_attack_in_a_step_keeps_its_own_radius(tape):
    def run(task):
        for epoch in range(3):
            train_step(task, replace(batch(epoch), epoch=epoch))

    graphs = StepGraphs("always", capture=tape)
    assert small_runs.same(*weights(lambda: own(TwoAttacks, eps_warmup=1.0), run, graphs))
    assert "a replay gives another result than the step" in graphs.refusals[0]


class FromItsConfig(ClassifierTask):
    """Reads the radius of the epoch, and adds to the parent's facts."""

    def captures(self, batch):
        return super().captures(batch), "mine"

    def training_step(self, batch):
        eps = self.config.attack.at_epoch(batch.epoch, batch.epochs).eps
        logits = self.model((batch.x + eps * torch.randn_like(batch.x)).clamp(0, 1))
        return torch.nn.functional.cross_entropy(logits, batch.y), {}


def test_a_step_that_reads_no_number_of_its_batch_is_refused(tape):
    task = own(FromItsConfig, eps_warmup=1.0)
    task.graphs = StepGraphs("always", capture=tape)
    with pytest.warns(UserWarning, match=r"the step does not read alpha, eps of batch\.numbers: see Task\.numbers"):
        train_step(task, batch(1))


def test_graphs_of_two_kinds_of_steps_are_kept(tape):
    task = classifier()
    task.graphs = StepGraphs("always", capture=tape)
    for n in (16, 12, 8):
        train_step(task, batch(1, n=n))
    assert [len(step.given.x) for step in task.graphs.whole_steps.values()] == [12, 8]


class Doubled(ClassifierTask):
    """Reads the epoch in its step, and does not say so."""

    def training_step(self, batch):
        loss, metrics = super().training_step(batch)
        return loss * (1 + batch.epoch), metrics


def _frozen(task: Task, number: int) -> None:
    for weight in task.model.conv1.parameters():
        weight.requires_grad_(number != 1)


def _smoothed(task: Task, number: int) -> None:
    task.config = replace(task.config, label_smoothing=0.5 * (number == 1))


@pytest.mark.parametrize(
    ("make", "change"),
    [(lambda: own(Doubled), None), (classifier, _frozen), (classifier, _smoothed)],
    ids=["own step", "frozen weights", "another loss"],
)
def test_a_change_of_the_task_is_noticed(tape, make, change):
    def run(task):
        for number in range(3):
            if change is not None:
                change(task, number)
            train_step(task, replace(batch(number), epoch=number, epochs=3))

    assert small_runs.same(*weights(make, run, StepGraphs("always", capture=tape)))


#: Launches of a training step, eager and beside captured steps, where kernels serve and optimizers are fused. Another
#: version of PyTorch may take a few more or less.
COUNTS = {
    # no image drifts so far that it is replayed
    "ARREST": (lambda: arrest(steps=10, tau=10.0), 673, 6),
    "CARSO": (lambda: carso("classifier", steps=10), 807, 7),
    "CARSO, pipeline": (lambda: carso("pipeline", steps=10), 1546, 7),
    "AToP": (lambda: atop_task("classifier"), 245, 7),
    "AToP, GAN": (lambda: atop_task("classifier", gan_grad=True), 431, 10),
    "AToP, pipeline": (lambda: atop_task("pipeline", steps=10), 1966, 7),
}


@pytest.mark.skipif(not _library.loaded(), reason="no compiled extension")
@pytest.mark.parametrize("name", COUNTS)
def test_what_the_host_launches_in_a_step(name, launched):
    make, eager, captured = COUNTS[name]
    with use_backend("cpp"):
        for graphs, count in ((None, eager), (StepGraphs("always", capture=launched), captured)):
            task = make()
            task.graphs = graphs
            for optimizer in task.optimizers.values():
                fuse(optimizer, True)
            first, second, third = map(batch, (1, 2, 3))
            train_step(task, first)
            train_step(task, second)
            with CudaLaunches() as launches:
                train_step(task, third)
            assert abs(launches.count - count) <= max(2, 0.05 * count), launches.by_name


def test_a_packed_decoder_that_is_trained_is_read_as_it_is_now(rerun, monkeypatch):
    """In bfloat16 a GPU decodes from packed weights, which are packed again after every step of the training."""
    monkeypatch.setattr("purify_fast.methods.carso.defence.kernel_decodes", lambda device: True)
    batches, graphs = [batch(1), batch(2), batch(3), batch(4)], StepGraphs("always", capture=rerun)
    wanted, found = (trained(carso("pipeline", "bfloat16"), given, batches) for given in (None, graphs))
    assert wanted[0] == found[0] and rerun.recorded == 1 and rerun.replayed == 4
    assert small_runs.same(wanted[1], found[1])


def test_arrest_attacks_all_images_only_while_its_step_is_captured(rerun, monkeypatch):
    monkeypatch.setattr("purify_fast.speed.graphs.step_graphs.CAPTURE_STEPS", 2)
    attacked = []
    for error, all_rows in ((None, True), (RuntimeError("operation not permitted"), False)):
        rerun.error = error
        # no image drifts so far, and all rows are those that are attacked
        task = arrest(tau=10.0)
        task.captures = lambda batch: None
        task.graphs = StepGraphs("step", capture=rerun)
        monitored = task.attack
        task.attack = lambda batch, attack, rows=None, run=monitored: attacked.append(rows) or run(batch, attack, rows)
        for seed in (1, 2, 3):
            train_step(task, batch(seed))
        assert task.attacks_all_rows(torch.device("cpu")) == all_rows
        assert not task.attacks_all_rows(torch.device("cuda"))
        assert (attacked[-1] is None) == all_rows


def test_fit_hands_out_graphs_on_a_gpu_and_takes_them_back(rerun, monkeypatch):
    task, seen = classifier(), []
    step, task.captures = task.training_step, lambda batch: None
    task.training_step = lambda batch: (seen.append(task.graphs), step(batch))[1]
    x, y = (torch.rand(32, *SHAPE) * 255).to(torch.uint8), torch.arange(32) % 10
    fit(task, x, y, FitConfig(1, 16), progress=False)
    assert seen == [None, None] and task.graphs is None
    task.graphs = mine = StepGraphs("always", capture=rerun)
    fit(task, x, y, FitConfig(1, 16), progress=False)
    fit(task, x, y, FitConfig(1, 16, cuda_graphs="off"), progress=False)
    assert seen[2:] == [mine, mine, None, None] and task.graphs is mine
    task.graphs = None
    with monkeypatch.context() as patch:
        # nothing is computed on the device
        patch.setattr(sys.modules["purify_fast.training.loop"], "fuse", lambda optimizer, fused: fused)
        with step_settings(task, FitConfig(1), torch.device("cuda")):
            assert isinstance(task.graphs, StepGraphs) and task.graphs.mode == "auto"
            assert torch.backends.cudnn.benchmark
        with step_settings(task, FitConfig(1, cuda_graphs="off", cudnn_benchmark="off"), torch.device("cuda")):
            assert task.graphs is None and not torch.backends.cudnn.benchmark
    assert task.graphs is None and not torch.backends.cudnn.benchmark


class Short(ClassifierTask):
    """Memory runs out after its forward pass, which moves BatchNorm statistics, as often as ``fails`` says."""

    fails = 0

    def training_step(self, batch):
        result = super().training_step(batch)
        if self.fails:
            self.fails -= 1
            raise torch.OutOfMemoryError
        return result


class Counted(nn.Sequential):
    """Has statistics of both kinds: numbers of each channel, and a count."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 10))


def test_a_step_that_is_repeated_after_memory_ran_out_counts_its_batch_once(rerun):
    found = []
    for fails in (0, 1):
        torch.manual_seed(0)
        task = Short(Counted(), ClassifierConfig(attack=attack()))
        task.graphs, task.fails = StepGraphs("step", capture=rerun), fails
        # a graph whose memory can be freed
        task.graphs.whole_steps["another"] = object()
        train_step(task, batch(1))
        assert task.graphs.mode == ("off" if fails else "step") and task.fails == 0
        found.append(task.model.state_dict())
    assert small_runs.same(*found) and found[0]["1.num_batches_tracked"] == 1


@pytest.mark.parametrize("where", ["second update", "optimizer", "replay"])
def test_a_step_of_which_a_part_is_applied_is_not_repeated(rerun, where, monkeypatch):
    task = atop_task("classifier", gan_grad=True)
    task.graphs = StepGraphs("always" if where == "replay" else "auto", capture=rerun)
    task.graphs.whole_steps["another"] = object()
    fail = mock.Mock(side_effect=torch.OutOfMemoryError)
    if where == "replay":
        train_step(task, batch(1))
    if where == "second update":
        monkeypatch.setattr(task, "_with_discriminator", fail)
    else:
        monkeypatch.setattr(task.optimizers["discriminator"], "step", fail)
    with pytest.raises(NotRestored, match="memory ran out in a step that has changed the model already: resume"):
        train_step(task, batch(1))
    assert fail.call_count == 1


def test_weights_that_could_not_be_restored_end_the_training_although_graphs_could_be_dropped(tape, monkeypatch):
    task = classifier()
    task.graphs = StepGraphs("always", capture=tape)
    task.graphs.whole_steps["another"] = object()
    fail = mock.Mock(side_effect=NotRestored("out of memory"))
    monkeypatch.setattr(CapturedStep, "_record", fail)
    with pytest.raises(NotRestored):
        train_step(task, batch(1))
    assert fail.call_count == 1


@pytest.mark.parametrize("make", [classifier_task, arrest_task], ids=["PGD-AT", "ARREST"])
def test_the_copy_that_a_graph_attacks_keeps_its_memory(tape, make):
    """With a hook the training's copy gets other tensors. Afterwards the old graph serves again."""
    task = make(precision="bfloat16", attack=attack(steps=2))
    task.graphs = StepGraphs("always", capture=tape)
    train_step(task, batch(1))
    (step,) = task.graphs.whole_steps.values()
    at = {one.data_ptr() for one in task.attacked._made.parameters()}
    hook = task.model.register_forward_hook(lambda *given: None)
    train_step(task, batch(2))
    hook.remove()
    train_step(task, batch(3))
    assert step in task.graphs.whole_steps.values()
    assert at <= {one.data_ptr() for one in step.objects if isinstance(one, torch.Tensor)}


def test_a_replay_is_compared_with_as_much_noise_as_the_step_has():
    """Results of a kernel that adds in another order: a scalar, a small and a large gradient."""
    source = torch.Generator().manual_seed(0)
    exact = [torch.tensor(0.4), torch.ones(3), torch.ones(1000)]

    def noisy() -> list[torch.Tensor]:
        return [one + 0.01 * torch.randn(one.shape, generator=source) for one in exact]

    trials = [[noisy() for _ in range(1 + REPEATS)] for _ in range(300)]
    assert sum(not within_repeats(got, repeats) for got, *repeats in trials) <= 9
    for number in range(3):
        wrong = [[*got[:number], 2 * got[number], *got[number + 1 :]] for got, *_ in trials]
        assert not any(within_repeats(got, repeats) for got, (_, *repeats) in zip(wrong, trials, strict=True))
    assert within_repeats(exact, [exact] * REPEATS) and not within_repeats(noisy(), [exact] * REPEATS)


def test_a_refused_capture_is_tried_again(tape, monkeypatch):
    monkeypatch.setattr("purify_fast.training.captured_step.RETRIED_AFTER", 2)
    task, error = classifier(), tape.error
    task.graphs, tape.error = StepGraphs("always", capture=tape), RuntimeError("no")
    with pytest.warns(UserWarning, match="a training step runs without a CUDA graph"):
        train_step(task, batch(1))
    tape.error = error
    for seed in range(3):
        assert not any(isinstance(step, CapturedStep) for step in task.graphs.whole_steps.values())
        train_step(task, batch(seed))
    assert any(isinstance(step, CapturedStep) for step in task.graphs.whole_steps.values())


def test_by_default_steps_of_attacks_are_captured_and_whole_steps_are_not(tape):
    for mode, whole in (("auto", False), ("step", True)):
        task = classifier()
        task.graphs = StepGraphs(mode, capture=tape)
        for seed in range(CAPTURE_STEPS + 2):
            train_step(task, batch(seed))
        assert any(isinstance(step, CapturedStep) for step in task.graphs.whole_steps.values()) is whole


def test_a_gradient_that_is_only_rounding_hides_no_wrong_gradient():
    """A bias before a BatchNorm has other bits in each run, and a norm that says nothing."""
    source = torch.Generator().manual_seed(0)
    good = torch.randn(64, 64, generator=source)

    def results(gradient: torch.Tensor) -> list[torch.Tensor]:
        noise = torch.randn(64, generator=source) * 1e-8
        return [noise, gradient + 1e-7 * torch.randn(64, 64, generator=source)]

    repeats = [results(good) for _ in range(REPEATS)]
    assert within_repeats(results(good), repeats)
    assert not any(within_repeats(results(wrong), repeats) for wrong in (-good, 0 * good, 2 * good, 1.1 * good))
    lost = [[torch.tensor([torch.nan, 1.0]).roll(i), good] for i in range(REPEATS)]
    assert not within_repeats([torch.ones(2), 100 * good], lost)
