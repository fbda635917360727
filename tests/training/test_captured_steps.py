"""Trainings with captured steps: the same bits as without, on a CPU where a function stands for a graph."""

import sys

import pytest
import torch
from cuda_launches import CudaLaunches
from small_runs import SHAPE, arrest_task, atop_task, attack, batch, carso_task, classifier_task

from purify_fast import _library
from purify_fast.ops import use_backend
from purify_fast.speed import StepGraphs
from purify_fast.training import Batch, FitConfig, Task, fit
from purify_fast.training.loop import step_settings, train_step
from purify_fast.training.optimizers import fuse

pytestmark = pytest.mark.usefixtures("one_thread")


def arrest(precision: str = "float32", steps: int = 3, norm: str = "linf", **options) -> Task:
    return arrest_task(attack=attack(steps=steps, norm=norm), precision=precision, **options)


def carso(target: str, precision: str = "float32", steps: int = 3) -> Task:
    return carso_task(target, attack=attack(steps=steps), precision=precision)


TASKS = {
    "classifier": lambda: classifier_task(attack=attack(steps=3)),
    "ARREST": arrest,
    "ARREST, l1": lambda: arrest(norm="l1", replay=False),
    "ARREST, bfloat16, no replay": lambda: arrest("bfloat16", replay=False),
    "CARSO": lambda: carso("classifier"),
    "CARSO, pipeline": lambda: carso("pipeline"),
    "CARSO, pipeline, bfloat16": lambda: carso("pipeline", "bfloat16"),
    "AToP": atop_task,
    "AToP, pipeline": lambda: atop_task("pipeline", 3),
    "AToP, pipeline, bfloat16": lambda: atop_task("pipeline", 3, precision="bfloat16"),
}


def trained(task: Task, graphs: StepGraphs | None, batches: list[Batch]) -> tuple[list[float], dict]:
    task.graphs, losses = graphs, []
    for one in batches:
        torch.manual_seed(one.seed)
        losses.append(float(train_step(task, one)["loss"]))
    return losses, task.model.state_dict()


@pytest.mark.parametrize("name", TASKS)
def test_captured_steps_of_attacks_train_the_same_weights(rerun, name):
    batches, graphs = [batch(1), batch(2), batch(3)], StepGraphs("always", capture=rerun)
    wanted, found = trained(TASKS[name](), None, batches), trained(TASKS[name](), graphs, batches)
    assert wanted[0] == found[0] and rerun.replayed > 0
    assert all(torch.equal(value, found[1][key]) for key, value in wanted[1].items())


#: Launches of a training step, eager and beside a captured attack, where kernels serve and optimizers are fused.
#: Another version of PyTorch may take a few more or less.
COUNTS = {
    # no image drifts so far that it is replayed
    "ARREST": (lambda: arrest(steps=10, tau=10.0), 673, 107),
    "CARSO": (lambda: carso("classifier", steps=10), 807, 179),
    "CARSO, pipeline": (lambda: carso("pipeline", steps=10), 1546, 146),
    "AToP": (lambda: atop_task("classifier"), 245, 196),
    "AToP, GAN": (lambda: atop_task("classifier", gan_grad=True), 431, 382),
    "AToP, pipeline": (lambda: atop_task("pipeline", steps=10), 1966, 206),
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
    batches = [batch(1), batch(2), batch(3), batch(4)]
    wanted, found = (
        trained(carso("pipeline", "bfloat16"), graphs, batches)
        for graphs in (None, StepGraphs("always", capture=rerun))
    )
    assert wanted[0] == found[0] and rerun.recorded == 1 and rerun.replayed == 12
    assert all(torch.equal(value, found[1][key]) for key, value in wanted[1].items())


def test_arrest_attacks_all_images_only_while_its_step_is_captured(rerun, monkeypatch):
    monkeypatch.setattr("purify_fast.speed.graphs.step_graphs.CAPTURE_STEPS", 2)
    attacked = []
    for error, all_rows in ((None, True), (RuntimeError("operation not permitted"), False)):
        rerun.error = error
        # no image drifts so far, and all rows are those that are attacked
        task = arrest(tau=10.0)
        task.graphs = StepGraphs(capture=rerun)
        monitored = task.attack
        task.attack = lambda batch, attack, rows=None, run=monitored: (attacked.append(rows), run(batch, attack, rows))[
            1
        ]
        for seed in (1, 2, 3):
            train_step(task, batch(seed))
        assert task.attacks_all_rows(torch.device("cpu")) == all_rows
        assert not task.attacks_all_rows(torch.device("cuda"))
        assert (attacked[-1] is None) == all_rows


def test_fit_hands_out_graphs_on_a_gpu_and_takes_them_back(rerun, monkeypatch):
    task, seen = classifier_task(attack=attack(steps=3)), []
    step = task.training_step
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
