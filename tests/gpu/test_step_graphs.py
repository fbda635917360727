"""Captured attack steps on a device: replays against launches; on a CPU a function stands for a graph."""

import pytest
import torch
from direct import direct
from on_device import DEVICE
from search_calls import apgd
from small_models import images_and_labels
from small_runs import SHAPE, arrest_task, atop_task, attack, batch, carso_task
from torch import Tensor, nn

from purify_fast.attacks import fgsm, pgd
from purify_fast.defences import NoisyEnsemble
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed import StepGraphs
from purify_fast.speed.folding.inference_copy import InferenceCopy
from purify_fast.speed.graphs import graphed_loop as step_graphs
from purify_fast.training.loop import train_step

pytestmark = pytest.mark.gpu
SIZES = {"linf": 0.1, "l2": 1.0, "l1": 8.0}


@pytest.fixture
def graphs(rerun) -> StepGraphs:
    # captured whatever the launches cost: these tests check the results
    return StepGraphs("always", capture=None if DEVICE.type == "cuda" else rerun)


@pytest.fixture(autouse=True)
def same_algorithms():
    """cuDNN takes the same algorithms whenever it is asked, so that results can be compared to the bit."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SmallCNN(width=8).to(DEVICE).eval()


def images(n: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    x, y = images_and_labels(n, SHAPE, 10, seed)
    return x.to(DEVICE), y.to(DEVICE)


def close(found: Tensor, wanted: Tensor) -> None:
    """The same operators on the same numbers: the same bits, unless a library adds in another order."""
    assert found.shape == wanted.shape and bool(found.isfinite().all())
    differs = ((found - wanted).abs() > 1e-5).float().mean()
    # where a gradient is nearly 0 another order of a sum gives another sign
    assert float(differs) < 0.01


@pytest.mark.parametrize("norm", SIZES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_replayed_attacks(graphs, norm, precision):
    model, (x, y) = InferenceCopy(classifier(), SHAPE, precision), images()
    eps = SIZES[norm]
    y = model(x).argmax(1)
    usual = {"steps": 20, "seed": 0}
    attacks = [(pgd, usual), (pgd, usual | {"alpha": eps / 4, "keep_best": True, "eot_iter": 2}), (fgsm, {})]
    # FGSM and PGD with a falling step are one step, but for the share that l1 moves
    counts = [1, 2, 3 if norm == "l1" else 2]
    for (attack_by, options), count in zip(attacks, counts, strict=True):
        wanted, *found = (
            direct(attack_by, model, x, y, eps=eps, norm=norm, **options, graphs=chosen)
            for chosen in (None, graphs, graphs, graphs)
        )
        for images_found in found:
            close(images_found, wanted)
        assert graphs.refusal is None and len(graphs) == count
    options = {"eps": eps / 10, "norm": norm, "steps": 40, "seed": 0, "leave_when_fallen": False}
    close(*(direct(apgd, model, x, y, **options, graphs=chosen) for chosen in (None, graphs)))
    assert len(graphs) > count


def test_draws_go_on_as_without_graphs(graphs):
    defence, (x, y) = NoisyEnsemble(classifier(), 0.1, 2).to(DEVICE), images()

    def run(chosen: StepGraphs | None, seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return direct(pgd, defence, x, y, eps=0.1, steps=20, seed=0, graphs=chosen), torch.rand(4, device=DEVICE)

    for seed in (1, 2):
        (wanted, after), (found, then) = run(None, seed), run(graphs, seed)
        close(found, wanted)
        assert torch.equal(after, then), "the generator of the device stands elsewhere"
    assert len(graphs) == 1


class Waits(nn.Module):
    """Asks for a number in the middle of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1.0 if float(x.sum()) > 0 else 2.0)


class OwnGenerator(nn.Module):
    """Draws from a generator of its own, which no graph follows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.generator = classifier(), torch.Generator(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.01 * torch.rand(x.shape, generator=self.generator, device=x.device))


@pytest.mark.parametrize("kind", [Waits, OwnGenerator])
def test_what_cannot_be_captured_runs_eagerly_and_leaves_the_device_usable(graphs, kind):
    model, (x, y) = kind(), images()

    def run(chosen: StepGraphs | None) -> Tensor:
        if kind is OwnGenerator:
            model.generator.manual_seed(5)
        return direct(pgd, model, x, y, eps=0.1, steps=20, seed=0, graphs=chosen)

    wanted = run(None)
    found = run(graphs)
    assert graphs.refusal is not None and len(graphs) == 0
    assert found.shape == wanted.shape and bool(found.isfinite().all())
    # the generator of the device draws, and another model is captured
    assert torch.rand(3, device=DEVICE).isfinite().all() and torch.randn(3, device=DEVICE).isfinite().all()
    plain = classifier()
    settings = {"eps": 0.1, "steps": 20, "seed": 0}
    close(direct(pgd, plain, x, y, **settings, graphs=graphs), pgd(plain, x, y, **settings))
    assert graphs.refusal is None


#: Trainings like those that tests/training/test_captured_attacks.py compares to the bit.
TASKS = {
    "ARREST": lambda: arrest_task(DEVICE, attack=attack(steps=4)),
    "ARREST, bfloat16": lambda: arrest_task(DEVICE, attack=attack(steps=4), precision="bfloat16"),
    "CARSO": lambda: carso_task("classifier", DEVICE, attack=attack(steps=4)),
    "CARSO, pipeline": lambda: carso_task("pipeline", DEVICE, attack=attack(steps=4)),
    # the decoder's kernel reads packed weights, which are packed again in every step
    "CARSO, pipeline, bfloat16": lambda: carso_task("pipeline", DEVICE, attack=attack(steps=4), precision="bfloat16"),
    "AToP": lambda: atop_task("classifier", device=DEVICE),
    "AToP, pipeline": lambda: atop_task("pipeline", 4, DEVICE),
    "AToP, GAN": lambda: atop_task("classifier", device=DEVICE, gan_grad=True),
}


@pytest.mark.parametrize("name", TASKS)
def test_trainings_with_captured_attacks(graphs, name):
    losses = []
    for chosen in (None, graphs):
        torch.manual_seed(0)
        task = TASKS[name]()
        task.graphs, found = chosen, []
        for seed in range(1, 6):
            torch.manual_seed(seed)
            found.append(float(train_step(task, batch(seed, device=DEVICE))["loss"]))
        losses.append(found)
    assert graphs.captures > 0 and losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="memory of a CUDA device")
def test_memory_does_not_grow(monkeypatch):
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 2)
    graphs, model = StepGraphs("always"), classifier()

    def attacks() -> int:
        for n in (8, 12, 16, 20):
            x, y = images(n)
            direct(pgd, model, x, y, eps=0.1, steps=20, seed=0, graphs=graphs)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    attacks()
    second = attacks()
    for _ in range(5):
        last = attacks()
    assert len(graphs) == 2 and last <= second + 2**21
