"""Trainings whose attack steps are captured: the same bits as without, on a CPU where a function stands for a graph."""

import sys
from unittest import mock

import pytest
import small_runs
import torch
from small_runs import EPS, SHAPE, arrest_task, atop_task, attack, batch, carso_task, classifier_task

from purify_fast.speed import StepGraphs
from purify_fast.training import FitConfig, Task, fit
from purify_fast.training.loop import step_settings, train_step


def trained(task: Task, graphs: StepGraphs | None, seeds: int) -> tuple[list[float], dict]:
    task.graphs, losses = graphs, []
    for seed in range(1, seeds + 1):
        torch.manual_seed(seed)
        losses.append(float(train_step(task, batch(seed))["loss"]))
    return losses, task.model.state_dict()


HALF = {"precision": "bfloat16"}
#: Trainings whose radius, step length or weight of the KL term changes in every epoch.
RISING = {
    "PGD-AT": lambda **rise: classifier_task(attack=attack(**rise)),
    "TRADES, alpha": lambda **rise: classifier_task(objective="trades", attack=attack(alpha=EPS, **rise)),
    "ARREST, l1": lambda **rise: arrest_task(attack=attack(norm="l1", **rise), replay=False),
    "ARREST, bfloat16": lambda **rise: arrest_task(attack=attack(**rise), **HALF),
    "CARSO": lambda **rise: carso_task(attack=attack(**rise), kl_delay=0.5, eps_mode="official_code"),
    "CARSO, alpha, bfloat16": lambda **rise: carso_task(attack=attack(alpha=EPS, **rise), **HALF),
    "CARSO, pipeline, bfloat16": lambda **rise: carso_task("pipeline", attack=attack(**rise), **HALF),
    "AToP, GAN": lambda **rise: atop_task(attack=attack(steps=10, **rise), cls_delay=2, gan_grad=True),
    "AToP, pipeline, bfloat16": lambda **rise: atop_task("pipeline", attack=attack(**rise), **HALF, cls_delay=2),
}
#: Those that every run has. The others are slow.
ALWAYS = {"PGD-AT", "ARREST, bfloat16", "CARSO", "AToP, GAN"}


@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in RISING])
def test_captured_attacks_train_the_same_weights_while_the_radius_rises(tape, name):
    """Each epoch ends with a validation, which reads the frozen classifier's copy again."""
    x, y = (torch.rand(24, *SHAPE) * 255).to(torch.uint8), torch.arange(24) % 10
    found = []
    for graphs in (None, StepGraphs("always", capture=tape)):
        task = RISING[name](eps_warmup=1.0)
        task.graphs = graphs
        fit(task, x, y, FitConfig(4, 8), progress=False, validation=(x[:8], y[:8]))
        found.append(task.model.state_dict())
    assert small_runs.same(*found) and tape.replayed > 0 and not graphs.refusals


def test_a_packed_decoder_that_is_trained_is_read_as_it_is_now(rerun, monkeypatch):
    """In bfloat16 a GPU decodes from packed weights, which are packed again after every step of the training."""
    monkeypatch.setattr("purify_fast.methods.carso.defence.kernel_decodes", lambda device: True)
    graphs = StepGraphs("always", capture=rerun)
    wanted, found = (trained(carso_task("pipeline", **HALF), given, 4) for given in (None, graphs))
    assert wanted[0] == found[0] and rerun.recorded == 1 and rerun.replayed == 8
    assert small_runs.same(wanted[1], found[1])


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
            assert isinstance(task.graphs, StepGraphs) and task.graphs.mode == "auto" and torch.backends.cudnn.benchmark
        with step_settings(task, FitConfig(1, cuda_graphs="off", cudnn_benchmark="off"), torch.device("cuda")):
            assert task.graphs is None and not torch.backends.cudnn.benchmark
    assert task.graphs is None and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_in_which_memory_ran_out_is_not_repeated(rerun, monkeypatch, graphs):
    """It may have changed weights: here those of the discriminator."""
    task = atop_task("classifier", gan_grad=True)
    task.graphs = StepGraphs("always" if graphs else "auto", capture=rerun)
    fail = mock.Mock(side_effect=torch.OutOfMemoryError)
    monkeypatch.setattr(task, "_with_discriminator", fail)
    words = "beside CUDA graphs: resume the run with cuda_graphs='off'" if graphs else "^$"
    with pytest.raises(RuntimeError if graphs else torch.OutOfMemoryError, match=words):
        train_step(task, batch(1))
    assert fail.call_count == 1


@pytest.mark.parametrize("make", [classifier_task, arrest_task], ids=["PGD-AT", "ARREST"])
def test_the_copy_that_a_graph_attacks_keeps_its_memory(tape, make):
    """With a hook the training's copy gets other tensors. Afterwards the old graph serves again."""
    task = make(**HALF, attack=attack())
    task.graphs = StepGraphs("always", capture=tape)
    train_step(task, batch(1))
    (step,) = task.graphs._captured.values()
    at = {one.data_ptr() for one in task.attacked._made.parameters()}
    hook = task.model.register_forward_hook(lambda *given: None)
    train_step(task, batch(2))
    hook.remove()
    train_step(task, batch(3))
    assert step in task.graphs._captured.values()
    assert at <= {one.data_ptr() for one in step.objects if isinstance(one, torch.Tensor)}
