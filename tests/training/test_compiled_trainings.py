"""Trainings with ``compile=True``: nearly the weights of a training without it, and the same bits after a resume."""

import copy
from contextlib import nullcontext

import pytest
import small_runs
import torch
from captures import Rerun
from small_runs import arrest_task, atop_task, attack, batch, carso_task, classifier_task
from torch import nn

from purify_fast.speed import StepGraphs
from purify_fast.speed.graphs import compiled_step
from purify_fast.speed.graphs.graphed_loop import parts_of
from purify_fast.training import FitConfig, fit
from purify_fast.training.loop import train_step

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = {
    "clean": classifier_task,
    "PGD": lambda: classifier_task(attack=attack()),
    "TRADES": lambda: classifier_task(attack=attack(), objective="trades"),
    "ARREST": arrest_task,
    "ARREST, bfloat16, no replay": lambda: arrest_task(precision="bfloat16", replay=False),
    "CARSO": carso_task,
    "CARSO, pipeline": lambda: carso_task("pipeline"),
    "CARSO, pipeline, bfloat16": lambda: carso_task("pipeline", precision="bfloat16"),
    "AToP": atop_task,
    "AToP, GAN": lambda: atop_task(gan_grad=True),
    "AToP, pipeline": lambda: atop_task("pipeline"),
}


def losses(task, compiles: bool, steps: int = 3) -> list[float]:
    task.compiles = compiles
    task.begin()
    found = []
    for seed in range(steps):
        torch.manual_seed(seed)
        found.append(float(train_step(task, batch(seed))["loss"]))
    return found


def checked_steps(task) -> int:
    """The number of copies in a task whose compiled steps were compared with the steps as written."""
    models = [value for value in vars(task).values() if isinstance(value, nn.Module)]
    models += [] if task.attacked is None or task.attacked._made is None else [task.attacked._made]
    found = {id(steps): steps for one in models for part in parts_of(one, "compiled_steps") if (steps := part.steps)}
    return sum(steps.checked for steps in found.values())


@pytest.mark.parametrize("name", TASKS)
def test_a_compiled_training_has_nearly_the_losses_of_an_eager_one(name, compiler):
    wanted = losses(TASKS[name](), False)
    assert not compiler
    task = TASKS[name]()
    assert losses(task, True) == pytest.approx(wanted, rel=0.03 if "bfloat16" in name else 0.005)
    # The objective is one graph, besides the teacher of ARREST, and each compiled step of an attack is another.
    steps = checked_steps(task)
    assert len(compiler) == steps + 1 + name.startswith("ARREST")
    # ARREST attacks other numbers of images in its first half.
    assert steps == (name not in ("clean", "ARREST")) and not checked_steps(TASKS[name]())


@pytest.mark.parametrize("name", ["ARREST", "CARSO, pipeline", "TRADES"])
def test_a_compiled_training_that_is_killed_and_resumed_ends_with_the_same_bits(name, compiler, tmp_path, caplog):
    x = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y, config = torch.arange(40) % 10, FitConfig(3, 16, compile=True, checkpoint_seconds=0, drop_last=False)

    def run(folder, *callbacks):
        torch._dynamo.reset()
        task = TASKS[name]()
        stopped = pytest.raises(small_runs.Stopped) if callbacks else nullcontext()
        with stopped:
            fit(task, x, y, config, folder, progress=False, callbacks=callbacks)
        return task

    whole = run(tmp_path / "whole")
    assert checked_steps(whole)
    for step in (2, 5):
        run(tmp_path / "killed", small_runs.StopAt(step))
    assert small_runs.same(run(tmp_path / "killed"), whole)
    with caplog.at_level("WARNING"):
        fit(TASKS[name](), x, y, FitConfig(3, 16, drop_last=False), tmp_path / "killed", progress=False)
    assert "goes on with compile=False" in caplog.text


def scaled(module, given, output):
    """Change the outputs or the gradients of linear layers."""
    if isinstance(module, nn.Linear):
        return (
            0.1 * output
            if isinstance(output, torch.Tensor)
            else tuple(one if one is None else one / 10 for one in given)
        )
    return None


modules = nn.modules.module
HOOKS = {
    "forward": lambda model: model.conv2.register_forward_hook(lambda layer, given, output: 3 * output),
    "before": lambda model: model.conv1.register_forward_pre_hook(lambda layer, given: (given[0] / 2,)),
    "of all modules": lambda model: modules.register_module_forward_hook(scaled),
    "of all gradients": lambda model: modules.register_module_full_backward_hook(scaled),
}


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        *((name, hook) for name in ("clean", "PGD", "ARREST") for hook in ("forward", "before")),
        *(("clean", hook) for hook in list(HOOKS)[2:]),
    ],
)
def test_hooks_count_from_the_step_at_which_they_are_set(name, hook, compiler):
    found = []
    for compiles, hooked in ((False, False), (False, True), (True, True)):
        task = TASKS[name]()
        losses(task, compiles, 1)
        handle = HOOKS[hook](task.model)
        if not hooked:
            handle.remove()
        try:
            found.append(losses(task, compiles))
        finally:
            handle.remove()
    assert found[2] == pytest.approx(found[1], rel=0.005) and found[1] != found[0]


@pytest.mark.parametrize("name", ["clean", "ARREST", "CARSO"])
def test_a_copy_of_a_compiled_training_trains_its_own_weights(name, compiler):
    task = TASKS[name]()
    losses(task, True, 1)
    other, before = copy.deepcopy(task), copy.deepcopy(task.model.state_dict())
    losses(other, True, 2)
    assert small_runs.same(task.model.state_dict(), before) and not small_runs.same(other, task)


def test_compiled_steps_are_not_captured(compiler):
    task = TASKS["PGD"]()
    task.graphs = StepGraphs("always", Rerun())
    losses(task, True)
    assert not task.graphs.refusals and not task.graphs.captures


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PGD", "ARREST, bfloat16, no replay", "CARSO", "CARSO, pipeline", "AToP, pipeline"])
def test_inductor_compiles_each_training(name):
    torch._dynamo.reset()
    assert compiled_step.BACKEND == "inductor"
    wanted = losses(TASKS[name](), False)
    assert losses(TASKS[name](), True) == pytest.approx(wanted, rel=0.03 if "bfloat16" in name else 0.01)
    torch._dynamo.reset()
