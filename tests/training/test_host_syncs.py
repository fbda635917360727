"""The waits of Auto-PGD and of augmentations: on a GPU, these operators stop the host until they are done."""

from collections import Counter

import pytest
import torch
from direct import direct
from host_syncs import HostSyncs
from small_runs import EPS, batch

from purify_fast.attacks import GradientHealth, apgd
from purify_fast.data import crop_flip
from purify_fast.models.classifiers import SmallCNN


def probe(steps: int, **options) -> Counter:
    """The operators that an attack of so many steps waits for."""
    torch.manual_seed(0)
    model, step = SmallCNN(width=4).eval(), batch()
    y = model(step.x).argmax(1).detach()
    with HostSyncs() as waits:
        direct(apgd, model, step.x, y, eps=EPS, steps=steps, health=GradientHealth(), **options)
    assert waits.dispatched > 30
    return waits.counts


APGD = {norm: {"norm": norm} for norm in ("linf", "l2", "l1")} | {"targets": {"loss": "dlr_targeted"}}


@pytest.mark.parametrize("name", APGD)
def test_apgd_waits_where_images_may_leave_and_nowhere_else(name):
    options = APGD[name]
    staying = [probe(steps, leave_when_fallen=False, **options) for steps in (10, 40)]
    assert staying[0] == staying[1], "a step waits"
    # once for each wave of runs, to know which images are left, where its best points go, and how its gradients were
    assert {wait.function for wait in staying[0]} <= {"left", "keep_best", "likeliest_wrong", "waves"}
    leaving = probe(40, **options) - staying[1]
    # after the first few steps and then every five, to know which images have fallen; once, whether gradients are zero
    runs = 9 if name == "targets" else 1
    assert {wait.function for wait in leaving} <= {"confirm_successes", "kept", "_is_blind"}
    assert leaving.total() <= 2 * 15 * runs


def test_augmentation_does_not_wait_for_the_device():
    step = batch()
    with HostSyncs() as waits:
        crop_flip(step.x, 3, step.sample_ids, 2, True)
    assert not waits.counts
