"""Direct attacks on a frozen copy, which are captured in the copy's own graphs."""

import copy
import logging
import pickle

import pytest
import torch
from captures import Rerun, Tape
from cuda_launches import CudaLaunches
from direct import direct
from search_calls import square
from torch import nn

import purify_fast
from purify_fast import Atop
from purify_fast.attacks import pgd
from purify_fast.methods.atop import SmallGenerator
from purify_fast.models.classifiers import PreActResNet18
from purify_fast.speed import StepGraphs
from purify_fast.speed.graphs.graphed_loop import CAPTURE_STEPS, leave_no_trace
from purify_fast.training import Batch, TrainingAttack

CPU = torch.device("cpu")


@pytest.fixture(params=[Rerun, Tape])
def capture(request):
    return request.param()


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    return nn.Sequential(*layers).eval()


def attacked(model=None, dtype=torch.float32):
    """A copy of a network, images and labels."""
    x = torch.rand(6, 3, 8, 8)
    return purify_fast.frozen_copy(model or network(), x, dtype=dtype), x, torch.arange(6) % 5


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
    assert rerun.recorded == 1 and pickle.loads(pickle.dumps(fast))._followed.graphs is None
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
        assert torch.equal(purify_fast.attacks.PGD(steps=3)(around, x, y, eps=8 / 255, seed=0), wanted) and not calls
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
    # the step, and the reading of the model
    assert rerun.recorded == 2


class Launched(Rerun):
    """Stands for graphs whose replays launch nothing after the first, which is compared with the function."""

    def record(self, run, device):
        first = [super().record(run, device)]
        return lambda: first.pop()() if first else None


def test_an_attack_on_an_unchanged_model_launches_little_beside_its_replays():
    """No kernel for a tensor, and none for the reading of the model, which is one replay."""
    fast, x, y = attacked(PreActResNet18(width=4).eval(), torch.bfloat16)
    assert fast.folded > 5
    fast._followed.graphs = StepGraphs("always", capture=Launched())
    for _ in range(3):
        pgd(fast, x, y, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)
    with CudaLaunches() as counted:
        pgd(fast, x, y, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)
    assert counted.count <= 20 and not any(name.startswith("_foreach") for name in counted.by_name), counted.by_name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_reading_follows_every_write(capture, dtype):
    model = network()
    fast, x, y = attacked(model, dtype)
    fast._followed.graphs = StepGraphs("always", capture=capture)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    def other_memory():
        # A graph has the addresses of the tensors at its capture.
        model[0].weight.data = 1.5 * model[0].weight.data

    def uncounted():
        model[1].running_var.data.mul_(2)

    recorded = []
    for change in (lambda: None, step, uncounted, step, other_memory, step):
        change()
        found = pgd(fast, x, y, eps=0.1, steps=4, seed=0)
        new = purify_fast.frozen_copy(model, x, dtype=dtype)
        new._followed.graphs = None
        assert torch.equal(found, pgd(new, x, y, eps=0.1, steps=4, seed=0))
        recorded.append(capture.recorded)
    # The step, then the reading, and both again in other memory: the network is made again.
    assert recorded[1:4] == [2] * 3 and recorded[-1] <= 4


def test_a_replayed_reading_is_seen_by_a_backward_pass_of_an_earlier_call(rerun):
    fast, x, y = attacked()
    fast._followed.graphs = StepGraphs("always", capture=rerun)
    for _ in range(2):
        pgd(fast, x, y, eps=0.1, steps=2)
    out = fast(x.requires_grad_())
    pgd(fast, x.detach(), y, eps=0.1, steps=2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_reading_that_cannot_be_captured_runs_as_it_is_written(rerun, caplog):
    caplog.set_level(logging.INFO, "purify_fast")
    model = network()
    fast, x, y = attacked(model)
    fast._followed.graphs = graphs = StepGraphs("always", capture=rerun)
    pgd(fast, x, y, eps=0.1, steps=2)
    rerun.error = RuntimeError("no memory is left for a graph")
    for factor in (1.0, 2.0, 0.5):
        model[0].weight.data.mul_(factor)
        found = pgd(fast, x, y, eps=0.1, steps=2, seed=0)
        assert torch.equal(found, pgd(purify_fast.frozen_copy(model, x), x, y, eps=0.1, steps=2, seed=0))
    assert rerun.recorded == 1 and not graphs.refusals and not graphs.lock.locked()
    assert caplog.text.count("Values is not captured: RuntimeError: no memory is left for a graph") == 1


class KeepsNormsFrozen(nn.Sequential):
    """An own ``train()``, as fine-tuning code often has it."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("own", [True, False], ids=["direct", "of a training"])
def test_a_copy_that_is_made_again_in_every_attack_is_refused_with_its_reason(rerun, own):
    """A graph would serve in a single attack, and the copies before would be kept with their graphs."""
    fast, x, y = attacked(KeepsNormsFrozen(*network()).eval())
    graphs, steps = StepGraphs(capture=rerun), 2 * CAPTURE_STEPS
    fast._followed.graphs = graphs if own else None
    batch = Batch(x, y, torch.arange(6), seed=1)

    def attack():
        if own:
            pgd(fast, x, y, eps=0.1, steps=steps)
        else:
            TrainingAttack(eps=0.1, steps=steps).run(fast, batch, graphs=graphs)

    reason = r"made again in every attack, because KeepsNormsFrozen \(the model\) computes in train\(\) or eval\(\)"
    with pytest.warns(UserWarning, match=reason):
        attack()
    for _ in range(3):
        attack()
    assert rerun.recorded == 0 and len(graphs.refusals) == 1
