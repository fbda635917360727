"""The waits of a training step and its attack: on a GPU, each of these operators stops the host until it is done."""

from collections import Counter

import pytest
import torch
from direct import direct
from host_syncs import HostSyncs
from small_models import carso
from small_runs import EPS, arrest_task, atop_task, attack, batch, carso_task, diffusion_task

from purify_fast.attacks import BpdaModel, GradientHealth, apgd, fgsm, pgd, stadv
from purify_fast.data import crop_flip
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed import StepGraphs


def arrest(**options):
    return arrest_task(attack=attack(alpha=EPS / 2), **options)


#: What waits, and why it may.
STEPS = {
    "ARREST": (arrest, {("nonzero", "methods/arrest/task.py", "inputs"): "only images that drifted are attacked"}),
    "ARREST, no replay": (lambda: arrest(replay=False), {}),
    "CARSO": (lambda: carso_task("classifier"), {}),
    "CARSO, pipeline": (lambda: carso_task("pipeline"), {}),
    "AToP": (lambda: atop_task("classifier"), {}),
    "AToP, pipeline": (lambda: atop_task("pipeline"), {}),
    "diffusion": (diffusion_task, {}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_wait_for_the_device(name):
    torch.manual_seed(0)
    make, allowed = STEPS[name]
    task, step = make(), batch()
    task.model.train()
    task.training_step(step)[0].backward()  # what is made once is made
    with HostSyncs() as waits:
        task.training_step(step)[0].backward()
    assert waits.dispatched > 100
    assert set(waits.counts) <= set(allowed), waits.counts


def test_arrest_waits_for_nothing_once_its_attack_is_captured(rerun):
    torch.manual_seed(0)
    task, step = arrest(), batch()
    task.graphs = StepGraphs("always", capture=rerun)
    task.training_step(step)[0].backward()
    with HostSyncs() as waits:
        task.training_step(step)[0].backward()
    assert rerun.recorded == 1 and rerun.replayed == 4 and not waits.counts


def defence():
    return carso().eval()


def probe(steps: int, run=pgd, model=None, **options) -> Counter:
    """The operators that an attack of so many steps waits for."""
    torch.manual_seed(0)
    model, step = SmallCNN(width=4).eval() if model is None else model(), batch()
    y = model(step.x).argmax(1).detach()
    options = {"eps": EPS, "health": GradientHealth(), **({} if run is fgsm else {"steps": steps}), **options}
    with HostSyncs() as waits:
        direct(run, model, step.x, y, **options)
    assert waits.dispatched > 30
    return waits.counts


#: Attacks outside of trainings.
ATTACKS = {
    **{f"PGD {norm}": {"norm": norm} for norm in ("linf", "l2", "l1")},
    "PGD that keeps the best point of several draws": {"keep_best": True, "eot_iter": 3, "loss": "dlr"},
    "PGD on a defence": {"model": defence, "loss": "margin", "eot_iter": 2, "max_forward_batch": 24},
    "FGSM": {"run": fgsm},
    "StAdv": {"run": stadv, "keep_best": True},
    "BPDA": {"model": lambda: BpdaModel.of(defence())},
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_does_not_wait_for_the_device(name):
    waits = probe(4, **ATTACKS[name])
    if ATTACKS[name].get("eot_iter", 1) == 1 or ATTACKS[name].get("model") is defence:
        assert not waits
    else:
        # asked once, before the first step: how a model of the user draws
        assert {wait.function for wait in waits} == {"differ", "apart"} and waits == probe(9, **ATTACKS[name])


APGD = {norm: {"norm": norm} for norm in ("linf", "l2", "l1")} | {"targets": {"loss": "dlr_targeted"}}


@pytest.mark.parametrize("name", APGD)
def test_apgd_waits_where_images_may_leave_and_nowhere_else(name):
    options = APGD[name]
    staying = [probe(steps, apgd, leave_when_fallen=False, **options) for steps in (10, 40)]
    assert staying[0] == staying[1], "a step waits"
    # once for each wave of runs, to know which images are left, where its best points go, and how its gradients were
    assert {wait.function for wait in staying[0]} <= {"left", "keep_best", "likeliest_wrong", "waves"}
    leaving = probe(40, apgd, **options) - staying[1]
    # after the first few steps and then every five, to know which images have fallen; once, whether gradients are zero
    runs = 9 if name == "targets" else 1
    assert {wait.function for wait in leaving} <= {"confirm_successes", "kept", "_is_blind"}
    assert leaving.total() <= 2 * 15 * runs


def test_augmentation_does_not_wait_for_the_device():
    step = batch()
    with HostSyncs() as waits:
        crop_flip(step.x, 3, step.sample_ids, 2, True)
    assert not waits.counts
