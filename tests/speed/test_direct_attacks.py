"""Direct attacks on a frozen copy, which are captured in the copy's own graphs."""

import copy
import logging
import pickle

import pytest
import torch
from captures import Rerun, Tape
from direct import direct
from torch import nn

import purify_fast
from purify_fast import Atop
from purify_fast.attacks import pgd, square
from purify_fast.methods.atop import SmallGenerator
from purify_fast.speed import StepGraphs
from purify_fast.speed.graphs.graphed_loop import CAPTURE_STEPS, leave_no_trace

CPU = torch.device("cpu")


@pytest.fixture(params=[Rerun, Tape])
def capture(request):
    return request.param()


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    return nn.Sequential(*layers).eval()


def attacked(model=None):
    """A copy of a network, images and labels."""
    x = torch.rand(6, 3, 8, 8)
    return purify_fast.frozen_copy(model or network(), x, dtype=torch.float32), x, torch.arange(6) % 5


def attack_of(name):
    if name == "pgd":
        return lambda model, x, y: pgd(model, x, y, eps=8 / 255, steps=10, seed=0)
    return lambda model, x, y: square(model, x, y, eps=8 / 255, n_queries=60, seed=0)


@pytest.mark.parametrize("name", ["pgd", "square"])
def test_a_direct_attack_on_a_copy_is_captured(name, capture, caplog):
    caplog.set_level(logging.INFO, "purify_fast")
    model, attack = network(), attack_of(name)
    fast, x, y = attacked(model)
    wanted = attack(fast, x, y)
    fast._followed.graphs = StepGraphs(capture=capture)
    found = [attack(fast, x, y) for _ in range(2 + CAPTURE_STEPS // 10)]
    assert capture.recorded >= 1 and capture.replayed >= 10 and all(torch.equal(one, wanted) for one in found)
    assert "an attack step of FrozenCopy is captured as a CUDA graph, in " in caplog.text
    # The weights are followed, and the graph is not made again.
    recorded = capture.recorded
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    assert torch.equal(attack(fast, x, y), attack(purify_fast.frozen_copy(model, x, dtype=torch.float32), x, y))
    assert capture.recorded == recorded
    # A second attack on the same copy, in another thread or inside a capture, runs without a graph.
    replayed = capture.replayed
    with fast._followed.graphs.lock:
        attack(fast, x, y)
    with leave_no_trace(CPU):
        attack(fast, x, y)
    assert capture.replayed == replayed and not fast._followed.graphs.lock.locked()


def test_only_copies_that_a_user_makes_have_graphs_and_graphs_off_is_off(rerun):
    fast, x, y = attacked()
    fast._followed.graphs = StepGraphs("always", capture=rerun)
    direct(pgd, fast, x, y, eps=8 / 255, steps=3, graphs=StepGraphs("off"))
    assert rerun.recorded == 0
    pgd(fast, x, y, eps=8 / 255, steps=3)
    assert rerun.recorded == 1
    assert pickle.loads(pickle.dumps(fast))._followed.graphs is None
    defence = purify_fast.frozen_copy(Atop(network(), SmallGenerator(3, width=2), (3, 8, 8), block=2), x)
    assert isinstance(defence._followed.graphs, StepGraphs)


def test_what_a_users_loss_reads_is_not_frozen(capture):
    fast, x, y = attacked()
    fast._followed.graphs = StepGraphs("always", capture=capture)
    options = {"eps": 8 / 255, "steps": 3, "random_start": False}
    for target in (y, (y + 1) % 5, (y + 2) % 5):

        def towards(logits, labels):
            return -nn.functional.cross_entropy(logits, target, reduction="none")  # noqa: B023

        found = pgd(fast, x, y, loss=towards, **options)
        how = {"toward": True, "graphs": StepGraphs("off"), **options}
        assert torch.equal(found, direct(pgd, fast, x, target, **how))
    assert capture.recorded == 0
    pgd(fast, x, None, targeted=y, **options)
    assert capture.recorded == 1


def test_the_module_inside_ddp_is_attacked(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x, y = network(), torch.rand(6, 3, 8, 8), torch.arange(6) % 5
        around, calls = nn.parallel.DistributedDataParallel(model), []
        around.register_forward_hook(lambda *_: calls.append(1))
        wanted = pgd(model, x, y, eps=8 / 255, steps=3, seed=0)
        assert torch.equal(pgd(around, x, y, eps=8 / 255, steps=3, seed=0), wanted)
        assert torch.equal(purify_fast.attacks.PGD(steps=3)(around, x, y, eps=8 / 255, seed=0), wanted)
        assert not calls
    finally:
        torch.distributed.destroy_process_group()


def test_ranges_of_pixels_that_are_made_anew_share_a_graph(rerun):
    """Normalized images have a range for each channel, which a user computes in every call."""
    fast, x, y = attacked()
    fast._followed.graphs = StepGraphs("always", capture=rerun)
    for low in (0.0, 0.0, 0.1):
        ends = {"clip_min": torch.full((3, 1, 1), low), "clip_max": torch.full((3, 1, 1), 0.9)}
        given = x.clamp(0.1, 0.9)
        images = pgd(fast, given, y, eps=0.2, steps=3, seed=0, **ends)
        plain = copy.deepcopy(fast)
        plain._followed.graphs = None
        assert torch.equal(images, pgd(plain, given, y, eps=0.2, steps=3, seed=0, **ends))
        assert float(images.amin()) >= low
    assert rerun.recorded == 1
