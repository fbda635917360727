"""Training steps, attack steps and calls of frozen copies on fake CUDA tensors: no line waits for the device. The
tests of memory that ends, and of kernels in compiled graphs, follow.

The launches of each are counted too, and may not grow without being noticed."""

import contextlib
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from captures import Rerun
from cuda_launches import CudaLaunches
from denoisers import defence as purifier
from direct import direct
from fake_cuda import FakeCuda, RefusedOnCuda
from functorch.compile import make_boxed_func
from search_calls import apgd, fab_t, square, stadv
from small_models import atop
from small_runs import SHAPE, arrest_task, atop_task, attack, batch, carso_task, classifier_task
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from purify_fast import frozen_copy
from purify_fast.attacks import fgsm, frozen, pgd
from purify_fast.defences import Defence
from purify_fast.judge.searches.apgd import AutoPgd
from purify_fast.methods.diffusion import Process
from purify_fast.models import SmallCNN
from purify_fast.models.classifiers import PreActResNet18
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import registry
from purify_fast.speed import StepGraphs
from purify_fast.speed.graphs import compiled_step
from purify_fast.speed.graphs.step_loop import begin_steps
from purify_fast.speed.watch import Watch
from purify_fast.training import Batch, Task
from purify_fast.training.loop import gradients, train_step
from purify_fast.training.optimizers import fuse

#: Launches beyond the number in a table. Another version of PyTorch may launch a few more.
SLACK = 0.03


def within(launches: CudaLaunches, most: int) -> None:
    """At most a few launches more than in the table. A table with many more than there are would notice nothing."""
    assert 0.8 * most - 2 <= launches.count <= (1 + SLACK) * most + 2, launches.by_name


def waits_for_nothing(run: Callable[[], object], fake: FakeCuda, most: int) -> set[str]:
    """Run twice: what is made once is made by then. Return the names of the launched operators."""
    launches = CudaLaunches()
    with fake.running(first=True):
        run()
    with fake.running(launches):
        run()
    within(launches, most)
    return set(launches.by_name)


def classifier(**options) -> Task:
    return classifier_task(attack=attack(steps=3), **options)


def arrest(**options) -> Task:
    return arrest_task(**{"attack": attack(steps=3), **options})


def carso(target: str, **options) -> Task:
    return carso_task(target, attack=attack(steps=3), **options)


#: Each training, in bfloat16 if it has that, and the launches of its gradients, of its optimizers, and of what comes
#: after them.
STEPS = {
    "PGD-AT, bfloat16": (lambda: classifier(precision="bfloat16"), 172),
    "PGD-AT, l2": (lambda: classifier_task(attack=attack(steps=3, norm="l2")), 133),
    "TRADES, bfloat16": (lambda: classifier(objective="trades", precision="bfloat16"), 298),
    "MART, bfloat16": (lambda: classifier(objective="mart", precision="bfloat16"), 272),
    "ARREST, bfloat16": (lambda: arrest(precision="bfloat16"), 230),
    "ARREST, average": (lambda: arrest(ema_decay=0.9), 178),
    "ARREST, l1, no replay": (lambda: arrest(attack=attack(steps=3, norm="l1"), replay=False), 169),
    "CARSO, bfloat16": (lambda: carso("classifier", precision="bfloat16"), 326),
    "CARSO, pipeline, bfloat16": (lambda: carso("pipeline", precision="bfloat16"), 645),
    "AToP": (lambda: atop_task("classifier"), 248),
    "AToP, GAN": (lambda: atop_task("classifier", gan_grad=True), 445),
    "AToP, pipeline, bfloat16": (lambda: atop_task("pipeline", 3, precision="bfloat16"), 985),
}


def on_the_card(task: Task) -> tuple[FakeCuda, Batch]:
    """Put a training on fake tensors, and return a batch for it."""
    real, fake = batch(1), FakeCuda()
    task.train()
    # Copies are compared with their models on real values.
    list(gradients(task, real))
    for weight in task.model.parameters():
        weight.grad = None
    fake.put(task)
    x, y, ids = map(fake.tensor, (real.x, real.y, real.sample_ids))
    return fake, replace(real, x=x, y=y, sample_ids=ids)


class Uncaptured(StepGraphs):
    """Takes all steps directly, because fake tensors cannot be captured."""

    def begin(self, function, state):
        return begin_steps(None, function, state)


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_waits_for_nothing(name):
    make, most = STEPS[name]
    task = make()
    for optimizer in task.optimizers.values():
        fuse(optimizer, True)
    fake, given = on_the_card(task)
    task.graphs = Uncaptured()

    def step() -> None:
        for optimizer, _ in gradients(task, given):
            task.optimizers[optimizer].step()
            task.after_step()

    waits_for_nothing(step, fake, most)


# -- attacks ----------------------------------------------------------------------------------------------------------
class Kept(StepGraphs):
    """Keeps the last step of each kind that an attack begins, and its state."""

    def __init__(self):
        super().__init__()
        self.steps: dict[str, tuple] = {}
        self.capture.kind = "cpu"

    def begin(self, function, state):
        self.steps[type(function).__name__] = function, dict(state)
        loop = begin_steps(None, function, state)
        loop.graphs = self
        return loop

    def find(self, function, state):
        return None


def plain() -> nn.Module:
    torch.manual_seed(0)
    return SmallCNN(width=4).eval()


def random_model() -> nn.Module:
    return carso_task().defence.eval()


LINF, L2, L1 = {"eps": 0.1}, {"eps": 1.0, "norm": "l2"}, {"eps": 5.0, "norm": "l1"}
NORMS = {"linf": LINF, "l2": L2, "l1": L1}
#: Each attack, its model and its options, and the launches of all kinds of its steps together.
ATTACKS = {
    **{f"PGD, {norm}": (pgd, plain, {"steps": 3, **ball}, 27) for norm, ball in NORMS.items()},
    "PGD, best of two draws": (pgd, random_model, {"steps": 3, "keep_best": True, "eot_iter": 2, **LINF}, 137),
    "PGD, a diffusion purifier": (pgd, lambda: purifier(SHAPE, process=Process(steps=6)), {"steps": 2, **LINF}, 244),
    "APGD, linf": (apgd, plain, {"steps": 10, **LINF}, 54),
    "APGD, l2": (apgd, plain, {"steps": 10, **L2}, 54),
    "APGD, l1": (apgd, plain, {"steps": 10, **L1}, 86),
    "APGD, targets": (apgd, plain, {"steps": 10, "loss": "dlr_targeted", "n_target_classes": 2, **LINF}, 54),
    **{f"FAB, {norm}": (fab_t, plain, {"steps": 5, "n_target_classes": 2, **ball}, 52) for norm, ball in NORMS.items()},
    **{f"Square, {norm}": (square, plain, {"n_queries": 40, **ball}, 21) for norm, ball in NORMS.items()},
    "Square, two draws": (square, random_model, {"n_queries": 20, "eot_iter": 2, **LINF}, 88),
    "StAdv": (stadv, plain, {"steps": 3, "keep_best": True}, 26),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_step_waits_for_nothing(name, monkeypatch):
    run, make, options, most = ATTACKS[name]
    model, real, kept, searches = make(), batch(1), Kept(), []
    fake, launches, mine = FakeCuda(), CudaLaunches(), AutoPgd.run
    monkeypatch.setattr(AutoPgd, "run", lambda search: (searches.append(search), mine(search))[1])
    y = model(real.x).argmax(1).detach()
    direct(run, model, real.x, y, graphs=kept, **options)
    assert kept.steps
    with frozen(model):
        for function, state in kept.steps.values():
            fake.put(function), fake.put(state)
            with fake.running(first=True):
                function(state)
            with fake.running(launches):
                function(state)
        # The checkpoints of Auto-PGD are beside its step.
        for search in searches[-1:]:
            search.loop.graphs = None
            fake.put(search)
            with fake.running(launches):
                search._turn(max(search.marks))
    within(launches, most)


@pytest.mark.parametrize("run", [pgd, fgsm])
@pytest.mark.parametrize("norm", NORMS)
def test_a_whole_attack_waits_for_nothing(run, norm):
    model, real, fake = plain(), batch(1), FakeCuda()
    fake.put(model)
    x, y = fake.tensor(real.x), fake.tensor(real.y)
    options = NORMS[norm] | ({} if run is fgsm else {"seed": 0, "steps": 3})
    for first in (True, False):
        with fake.running(first=first):
            run(model, x, y, **options)


# -- frozen copies ----------------------------------------------------------------------------------------------------
def stitched() -> nn.Module:
    return atop(transform="rt3").eval()


#: Each copy, and its launches in a prediction, a prediction with the gradient of the images, and an update of weights.
COPIES = {
    "ResNet-18, float32": (lambda: PreActResNet18(width=4), torch.float32, (58, 118, 29)),
    "ResNet-18, bfloat16": (lambda: PreActResNet18(width=4), torch.bfloat16, (60, 122, 30)),
    "AToP, rt3, bfloat16": (stitched, torch.bfloat16, (124, 228)),
    "CARSO, bfloat16": (random_model, torch.bfloat16, (76, 126, 18)),
    "CARSO, bfloat16, packed": (random_model, torch.bfloat16, (53, 95)),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_call_of_a_frozen_copy_waits_for_nothing(name, monkeypatch):
    make, dtype, counts = COPIES[name]
    torch.manual_seed(0)
    model, fake = make().eval(), FakeCuda()
    images = torch.rand(16, 3 if "ResNet" in name else 1, 16, 16)
    if packed := "packed" in name:
        monkeypatch.setattr("purify_fast.methods.carso.defence.kernel_decodes", lambda device: True)
    fast = frozen_copy(model, images, dtype=dtype)
    with torch.no_grad():
        # What is packed on a GPU is packed here, because PyTorch converts no modules with fake tensors.
        fast(images)
    fake.put(model), fake.put(fast)
    x = fake.tensor(images)
    if packed:
        with fake.running(first=True):
            Defence.prepare_replay(fast)
            fast._packed_from = Watch(fast.decoder)

    def predict() -> None:
        with torch.no_grad():
            fast(x)

    def differentiate() -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(fast(leaf).sum(), leaf)

    for run, most in zip((predict, differentiate, fast.update), counts, strict=False):
        names = waits_for_nothing(run, fake, most)
        assert any(used.startswith("decode_samples") for used in names) == packed


# -- the detector itself ----------------------------------------------------------------------------------------------
WAITS = [
    (lambda x: x * float(x.sum()), "_local_scalar_dense"),
    (lambda x: x[x > 0.5].sum(), r"nonzero|index"),
    (lambda x: x + torch.tensor([1.0]).to(x.device), "_to_copy copies from cpu to cuda"),
    (lambda x: x.cpu(), "_to_copy copies from cuda to cpu"),
    (lambda x: x if torch.equal(x, 2 * x) else -x, "equal"),
]


@pytest.mark.parametrize(("wrong", "message"), WAITS)
def test_a_wait_is_refused_and_named(wrong, message):
    fake = FakeCuda()
    x = fake.tensor(torch.rand(4, 3))
    # It is refused even if its error is caught.
    with pytest.raises(AssertionError, match=message), fake.running(), contextlib.suppress(RefusedOnCuda):
        wrong(x)


# -- memory that ends --------------------------------------------------------------------------------------------------
# Memory that ends at any operator of a capture changes nothing in a training.


class MemoryEnds(TorchDispatchMode):
    """Raises an error at one operator of a capture, or from there on at each operator that needs new memory."""

    def __init__(self, at: int, lasting: bool, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.at, self.lasting, self.count, self.active = at, lasting, 0, False
        make = StepGraphs._make

        def within(*given):
            self.active = True
            try:
                return make(*given)
            finally:
                self.active = False

        monkeypatch.setattr(StepGraphs, "_make", within)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.active:
            self.count += 1
            allocates = any(each.alias_info is None for each in function._schema.returns)
            if self.count == self.at or (self.lasting and 0 < self.at < self.count and allocates):
                raise torch.OutOfMemoryError("CUDA out of memory (a stand-in)")
        return function(*args, **(kwargs or {}))


def stepped(make, graphs: StepGraphs | None, ends: contextlib.AbstractContextManager) -> dict:
    """All that a training consists of after a step."""
    task, given = make(), batch(1)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    # There are gradients, moments and counts before the capture.
    train_step(task, batch(2))
    task.graphs = graphs
    with warnings.catch_warnings(), ends:
        warnings.simplefilter("ignore")
        train_step(task, given)
    return {
        "weights and buffers": dict(task.model.state_dict()),
        "gradients": [weight.grad for weight in task.model.parameters()],
        "modes": [part.training for part in task.model.modules()],
        "optimizers": [optimizer.state_dict() for optimizer in task.optimizers.values()],
        "generators": [torch.get_rng_state(), random.getstate(), torch.from_numpy(np.random.get_state()[1].copy())],
    }


def equal(tree, other) -> bool:
    pairs = zip(tree_leaves(tree), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", [classifier_task, pytest.param(carso_task, marks=pytest.mark.slow)])
def test_a_capture_in_which_memory_ends_changes_nothing(kind, lasting, monkeypatch):
    make = partial(kind, **({} if kind is classifier_task else {"target": "pipeline"}), attack=attack(steps=1))
    wanted = stepped(make, None, contextlib.nullcontext())

    def captured(at: int) -> tuple[dict, int]:
        with monkeypatch.context() as patch:
            ends, graphs = MemoryEnds(at, lasting, patch), StepGraphs("always", capture=Rerun())
            found = stepped(make, graphs, ends)
            assert len(graphs) == (at == 0)
            return found, ends.count

    found, whole = captured(0)
    assert equal(found, wanted) and whole > 100
    for at in range(1, whole + 1, 7):
        found, _ = captured(at)
        for part in found:
            assert equal(found[part], wanted[part]), f"{part}, after an error at operator {at} of {whole}"


# -- kernels in the graphs of compiled trainings -----------------------------------------------------------------------
# Kernels in the graphs of compiled trainings: the compiler of a GPU cannot fuse them with their neighbors.

#: For each training, the ops that move fewer bytes than their compiled references, or are as many launches.
AHEAD = {
    "ARREST": (lambda: arrest_task(attack=attack(steps=3)), set()),
    "CARSO, pipeline": (lambda: carso_task("pipeline", attack=attack(steps=3)), {"philox"}),
    "AToP": (lambda: atop_task("classifier"), {"contextual_attention"}),
    "AToP, pipeline": (lambda: atop_task("pipeline", 3), {"contextual_attention", "random_transform"}),
}


def on_a_gpu(name: str, kind: str, index: int | None, variant: str) -> str:
    """Choose a kernel where a graph for a GPU has one; here it is the CPU's, or the reference as an op."""
    used = REGISTRY[name].launch is not None and variant in REGISTRY[name].in_graphs.get("cuda", ())
    return "cpp" if used else "reference"


on_a_gpu._dynamo_marked_constant = True


@pytest.mark.slow
@pytest.mark.parametrize("name", AHEAD)
def test_compiled_steps_call_only_kernels_that_are_ahead_of_the_compiler(name, monkeypatch):
    make, wanted = AHEAD[name]
    found, graphs = set(), []

    def compiler(graph, inputs):
        graphs.append(graph)
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        found.update(one.split(".")[1].removesuffix("_backward") for one in targets if one.startswith("purify_fast."))
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(registry, "_in_graph", on_a_gpu)
    monkeypatch.setattr(compiled_step, "BACKEND", aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
    torch._dynamo.reset()
    task = make()
    task.compiles = True
    task.begin()
    train_step(task, batch(1))
    assert graphs and found == wanted
