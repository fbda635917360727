"""Plain calls of a frozen copy as graphs, and attacks that are called directly on a copy, on stand-ins for captures."""

import copy
import functools
import gc
import logging
import pickle
import threading

import pytest
import torch
from captures import Launched, Rerun, Tape
from cuda_launches import CudaLaunches
from host_syncs import HostSyncs
from torch import nn
from torch.autograd import forward_ad

import purify_fast
from purify_fast.attacks import pgd, square
from purify_fast.methods.atop import Atop, SmallGenerator
from purify_fast.speed.graphs.graphed_calls import LAUNCHED_CALLS, MOST_KINDS, GraphedCalls
from purify_fast.speed.graphs.step_graphs import StepGraphs, leave_no_trace
from purify_fast.speed.graphs.step_loop import CAPTURE_STEPS

CPU = torch.device("cpu")


def network(channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    return nn.Sequential(*layers).eval()


@pytest.fixture(params=[Rerun, Tape])
def capture(request):
    return request.param()


def copied(model, x, capture):
    """A copy whose calls are captured."""
    fast = purify_fast.frozen_copy(model, x, dtype=torch.float32, graphs=True)
    assert fast.about.endswith("calls as CUDA graphs")
    fast.graphed_calls = GraphedCalls(capture)
    return fast


@pytest.fixture
def graphed(capture):
    """A network, its copy whose calls are captured, and images."""
    model, x = network(), torch.rand(6, 3, 8, 8)
    return model, copied(model, x, capture), x


def logits_and_gradient(model, x):
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    return out.detach(), torch.autograd.grad(out.logsumexp(1).sum(), leaf)[0]


def capture_gradients(fast, x):
    """Calls with a gradient, the last of which is captured."""
    for _ in range(LAUNCHED_CALLS + 1):
        logits_and_gradient(fast, x)


def same(got, wanted) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))


def test_the_fourth_equal_call_is_a_replay_and_results_are_copies(graphed, capture, caplog):
    model, fast, x = graphed
    caplog.set_level(logging.INFO, "purify_fast")
    with torch.no_grad():
        for number in range(LAUNCHED_CALLS + 3):
            assert capture.replayed == 2 * max(0, number - LAUNCHED_CALLS)
            images = torch.rand_like(x)
            before = fast(images)
            kept = before.clone()
            fast(torch.rand(2, 3, 8, 8))
            assert same([before, kept], [model(images)] * 2)
    assert capture.recorded == 2 and caplog.text.count("captured as CUDA graphs, in ") == 2
    for _ in range(LAUNCHED_CALLS + 2):
        images = torch.rand_like(x)
        assert same(logits_and_gradient(fast, images), logits_and_gradient(model, images))
    # The gradient needs a pair of graphs.
    assert capture.recorded == 4


def test_images_that_need_no_gradient_have_no_backward_graph_where_gradients_are_enabled(graphed, capture):
    model, fast, x = graphed
    for _ in range(LAUNCHED_CALLS + 2):
        assert same([fast(x)], [model(x)])
    assert capture.recorded == 1


def test_a_call_before_the_backward_pass_of_the_one_before_runs_without_a_graph(graphed, capture):
    model, fast, x = graphed
    capture_gradients(fast, x)
    leaf, other, replayed = x.clone().requires_grad_(), torch.rand_like(x), capture.replayed
    out = fast(leaf)
    assert capture.replayed == replayed + 1
    # Neither a call with a gradient nor one without may overwrite what the backward pass needs.
    assert same(logits_and_gradient(fast, other), logits_and_gradient(model, other))
    with torch.no_grad():
        for _ in range(LAUNCHED_CALLS + 2):
            assert same([fast(other)], [model(other)])
    assert capture.replayed == replayed + 1
    gradient = torch.autograd.grad(out.logsumexp(1).sum(), leaf, retain_graph=True)[0]
    assert same([gradient], [logits_and_gradient(model, x)[1]]) and capture.replayed == replayed + 2
    if isinstance(capture, Tape):
        # A second backward pass with no call in between, as FAB takes one for each class.
        assert torch.equal(torch.autograd.grad(out.logsumexp(1).sum(), leaf, retain_graph=True)[0], gradient)
    fast(leaf)
    with pytest.raises(RuntimeError, match=r"came after a later call or other weights.*graphs=True"):
        torch.autograd.grad(out.sum(), leaf)


def test_a_forward_pass_whose_result_is_gone_holds_no_graph(graphed, capture):
    _, fast, x = graphed
    capture_gradients(fast, x)
    out = fast(x.clone().requires_grad_())
    del out
    gc.collect()
    replayed = capture.replayed
    logits_and_gradient(fast, x)
    assert capture.replayed == replayed + 2


def test_it_follows_the_weights_and_forgets_the_graphs_of_moved_tensors(graphed, capture):
    model, fast, x = graphed
    capture_gradients(fast, x)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.2)
    recorded = capture.recorded
    assert same(logits_and_gradient(fast, x), logits_and_gradient(model, x)) and capture.recorded == recorded
    # Between a forward and a backward pass, weights must stay, as without graphs.
    leaf = x.clone().requires_grad_()
    out = fast(leaf)
    with torch.no_grad():
        model[0].weight.mul_(2)
    fast.update()
    with pytest.raises(RuntimeError, match="other weights"):
        torch.autograd.grad(out.sum(), leaf)


def other_tensors(model):
    state = {name: 2 * value if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


CHANGES = {
    "other tensors": lambda fast: other_tensors(fast.classifier),
    "a part": lambda fast: setattr(fast.classifier, "2", nn.Tanh()),
    "a mode": lambda fast: setattr(fast.classifier[5], "training", True),
    "moved": lambda fast: fast.classifier.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_copy_delete_the_graphs(change):
    model, x = nn.Sequential(*network(), nn.Dropout(0.5)).eval(), torch.rand(6, 3, 8, 8)
    fast, plain = copied(model, x, Tape()), purify_fast.frozen_copy(model, x, dtype=torch.float32)
    capture_gradients(fast, x)
    for one in (fast, plain):
        CHANGES[change](one)
    for _ in range(LAUNCHED_CALLS + 2):
        torch.manual_seed(3)
        got = logits_and_gradient(fast, x)
        torch.manual_seed(3)
        assert same(got, logits_and_gradient(plain, x))


def test_other_weights_of_a_functional_call_are_read(graphed):
    _, fast, x = graphed
    with torch.no_grad():
        for _ in range(LAUNCHED_CALLS + 1):
            fast(x)
        other = {name: 2 * value for name, value in fast.named_parameters()}
        found = torch.func.functional_call(fast, other, (x,))
        fast.graphed_calls = None
        assert torch.allclose(found, torch.func.functional_call(fast, other, (x,)), atol=1e-5)


def test_weights_that_need_gradients_get_them(graphed, capture):
    _, fast, x = graphed
    capture_gradients(fast, x)
    replayed = capture.replayed
    fast.requires_grad_(True)
    fast(x).sum().backward()
    assert all(weight.grad is not None for weight in fast.parameters()) and capture.replayed == replayed


def test_second_derivatives_and_tangents_are_not_lost(graphed):
    _, fast, x = graphed
    capture_gradients(fast, x)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative.*graphs=True"):
        torch.autograd.grad(fast(leaf).sum(), leaf, create_graph=True)
    with torch.no_grad():
        for _ in range(LAUNCHED_CALLS + 1):
            fast(x)
    with forward_ad.dual_level():
        out = fast(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(out).tangent is not None


def test_a_call_that_changes_its_model_is_refused():
    class Counts(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (1 + self.calls // 20)

    x = torch.rand(4, 3, 8, 8)
    fast = copied(Counts(*network()).eval(), x, Rerun())
    with pytest.warns(RuntimeWarning, match="changes an attribute"), torch.no_grad():
        for _ in range(LAUNCHED_CALLS + 2):
            fast(x)


def test_a_random_call_draws_fresh_numbers(capture):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Dropout(0.5)).eval()
    model[2].train()
    x = torch.rand(6, 3, 8, 8)
    fast = copied(model, x, capture)
    torch.manual_seed(1)
    wanted = [logits_and_gradient(model, x) for _ in range(LAUNCHED_CALLS + 3)]
    torch.manual_seed(1)
    got = [logits_and_gradient(fast, x) for _ in range(LAUNCHED_CALLS + 3)]
    assert capture.recorded == 2 and all(map(same, got, wanted))
    assert not torch.equal(got[-1][0], got[-2][0])


@pytest.mark.parametrize("fault", ["host", "error", "stale"])
def test_what_cannot_be_captured_runs_without_a_graph_and_says_so(fault, monkeypatch):
    capture, x = Rerun(), torch.rand(4, 3, 8, 8)
    model = network()

    class Reads(nn.Sequential):
        def forward(self, x):
            # A value that is read would be a constant of the graph.
            return super().forward(x * float(x.sum() > 0) if fault == "host" else x)

    fast = copied(Reads(*model).eval(), x, capture)
    if fault == "error":
        capture.error = RuntimeError("no memory")
    if fault == "stale":
        monkeypatch.setattr(capture, "record", lambda run, device: run() or (lambda: None))
    message = {"host": "waits for the device", "error": "no memory", "stale": "another result"}[fault]
    with pytest.warns(RuntimeWarning, match=rf"calls with images \[4, 3, 8, 8\] run without a CUDA graph: .*{message}"):
        for _ in range(LAUNCHED_CALLS + 3):
            with torch.no_grad():
                images = torch.rand_like(x)
                assert same([fast(images)], [model(images)])


def test_calls_inside_captures_transforms_and_other_threads_have_no_graph(graphed, capture):
    model, fast, x = graphed
    with torch.no_grad():
        for _ in range(LAUNCHED_CALLS + 1):
            fast(x)
        replayed = capture.replayed
        with leave_no_trace(CPU):
            fast(x)
        assert torch.allclose(torch.func.vmap(lambda one: fast(one[None]))(x)[:, 0], model(x), atol=1e-5)
        with fast.graphed_calls._lock:
            thread = threading.Thread(target=lambda: fast(x))
            thread.start()
            thread.join()
    assert capture.replayed == replayed
    fast.graphed_calls.release()
    assert same(logits_and_gradient(torch.compile(fast, backend="eager"), x), logits_and_gradient(model, x))


def test_few_kinds_are_captured_and_copies_have_none(graphed, capture):
    _, fast, x = graphed
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=f"{MOST_KINDS} kinds of calls have graphs"):
        for images in range(1, MOST_KINDS + 3):
            for _ in range(LAUNCHED_CALLS + 1):
                fast(x[:1].repeat(images, 1, 1, 1))
    assert capture.recorded == MOST_KINDS
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not other.graphed_calls._kinds
        with torch.no_grad():
            assert torch.equal(other(x), fast(x))


def test_a_defence_has_no_graphed_calls():
    defence = Atop(network(), SmallGenerator(3, width=2), (3, 8, 8), block=2)
    with pytest.raises(ValueError, match="graphs must be False for a defence"):
        purify_fast.frozen_copy(defence, torch.rand(2, 3, 8, 8), graphs=True)


# -- attacks that are called directly ---------------------------------------------------------------------------------


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
    pgd(fast, x, y, eps=8 / 255, steps=3, graphs=StepGraphs("off"))
    assert rerun.recorded == 0
    pgd(fast, x, y, eps=8 / 255, steps=3)
    assert rerun.recorded == 1
    assert pickle.loads(pickle.dumps(fast))._followed.graphs is None
    defence = purify_fast.frozen_copy(Atop(network(), SmallGenerator(3, width=2), (3, 8, 8), block=2), x)
    assert isinstance(defence._followed.graphs, StepGraphs)


def test_memory_that_runs_out_drops_the_graphs_of_a_direct_attack(rerun, monkeypatch):
    fast, x, y = attacked()
    graphs = fast._followed.graphs = StepGraphs("always", capture=rerun)
    wanted, record = pgd(fast, x, y, eps=8 / 255, steps=3, seed=0), rerun.record

    def fails(run, device):
        replay, calls = record(run, device), iter([1])

        def replayed():
            if next(calls, None) is None:
                raise torch.OutOfMemoryError("no memory")
            replay()

        return replayed

    graphs._captured.clear()
    monkeypatch.setattr(rerun, "record", fails)
    graphs.beside = GraphedCalls(rerun)
    graphs.beside._kinds["a kind"] = 1
    assert torch.equal(pgd(fast, x, y, eps=8 / 255, steps=3, seed=0), wanted) and graphs.mode == "off"
    assert not graphs.beside._kinds and pickle.loads(pickle.dumps(graphs)).mode == "off"


def test_what_a_users_loss_reads_is_not_frozen(capture):
    fast, x, y = attacked()
    fast._followed.graphs = StepGraphs("always", capture=capture)
    options = {"eps": 8 / 255, "steps": 3, "random_start": False}
    for target in (y, (y + 1) % 5, (y + 2) % 5):

        def towards(logits, labels):
            return -nn.functional.cross_entropy(logits, target, reduction="none")  # noqa: B023

        found = pgd(fast, x, y, loss=towards, **options)
        assert torch.equal(found, pgd(fast, x, targeted=target, graphs=StepGraphs("off"), **options))
    assert capture.recorded == 0
    pgd(fast, x, targeted=y, **options)
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


def test_a_direct_attack_on_a_large_model_tells_once_of_copies(monkeypatch, recwarn):
    from purify_fast.speed import frozen_copy as copies

    monkeypatch.setattr(copies, "fast_bfloat16", lambda device: True)
    monkeypatch.setattr(copies, "_warn_once", functools.cache(copies._warn_once.__wrapped__))
    large, small = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2000), nn.Linear(2000, 5)).eval(), network()
    fast = purify_fast.frozen_copy(large, torch.rand(2, 3, 8, 8), dtype=torch.float32)
    for model in (small, fast, small.forward):
        copies.tell_of_copies(model, CPU)
    assert not recwarn.list
    for _ in range(2):
        copies.tell_of_copies(large, CPU)
    assert len(recwarn.list) == 1 and "purify_fast.frozen_copy(model, x)" in str(recwarn[0].message)


def test_a_profile_names_the_parts_of_the_work(rerun):
    model, graphs = network(), StepGraphs(capture=rerun)
    fast, x, y = attacked(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(2):
            pgd(fast, x, y, eps=8 / 255, steps=CAPTURE_STEPS, graphs=graphs)
        fast.update()
    names = {event.key for event in profile.key_averages()}
    parts = "attack step", "capture", "replay of an attack step", "refresh of a copy"
    assert {f"purify_fast: {part}" for part in parts} <= names


def test_a_replayed_call_launches_few_copies_and_waits_for_nothing(monkeypatch):
    x = torch.rand(6, 3, 8, 8)
    fast = copied(network(), x, Launched())
    capture_gradients(fast, x)
    # A counting mode is a dispatch mode, in which a call would have no graph.
    monkeypatch.setattr("purify_fast.speed.graphs.graphed_calls.is_in_torch_dispatch_mode", lambda: False)
    leaf, weight = x.clone().requires_grad_(), torch.ones(6, 5)
    with HostSyncs() as waits, CudaLaunches() as launches:
        torch.autograd.grad(fast(leaf), leaf, weight)
    # The images in, the logits out; the weights of the logits in, the gradient out.
    assert not waits.counts and launches.by_name == {"copy_": 2, "clone": 2}
