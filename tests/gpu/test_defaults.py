"""Each default for a GPU runs once, and is compared with the same run without graphs or copies."""

import inspect
from functools import partial

import denoisers
import pytest
import torch
from on_device import DEVICE
from small_models import images_and_labels, with_statistics
from small_runs import attack
from torch import Tensor, nn

from purify_fast import frozen_copy
from purify_fast.attacks import APGD, FABT, PGD, AttackContext, Square, pgd
from purify_fast.evaluation import EvaluateConfig, evaluate
from purify_fast.methods.diffusion import Process
from purify_fast.models.classifiers import PreActResNet18
from purify_fast.models.layers import Normalize
from purify_fast.speed import StepGraphs
from purify_fast.speed.frozen_copy import copy_or_model
from purify_fast.speed.graphs import compiled_step, graphed_loop
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit

pytestmark = pytest.mark.gpu
SHAPE, EPS = (3, 32, 32), 8 / 255


@pytest.fixture(autouse=True)
def settings(rerun, monkeypatch):
    """The same algorithms whenever cuDNN is asked. On a CPU a function stands for a graph."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if DEVICE.type != "cuda":
        monkeypatch.setattr(graphed_loop, "CudaCapture", lambda: rerun)
    elif "check_input_liveness" in inspect.signature(torch.cuda.graph.__init__).parameters:
        # A replay then fails if a tensor that its graph reads is gone.
        monkeypatch.setattr(torch.cuda, "graph", partial(torch.cuda.graph, check_input_liveness=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(PreActResNet18(width=4)).to(DEVICE).eval()


def images(n: int = 8) -> tuple[Tensor, Tensor]:
    return tuple(each.to(DEVICE) for each in images_and_labels(n, SHAPE, 10))


def near(found: Tensor, wanted: Tensor, share: float = 0.02) -> None:
    """Equal but for a share of the pixels, whose gradient is nearly 0: another order of a sum gives another sign."""
    assert found.shape == wanted.shape and bool(found.isfinite().all())
    assert float(((found - wanted).abs() > 1e-5).float().mean()) <= share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attacks_on_a_copy_follow_a_model_that_is_trained_between_them(dtype):
    """The copy reads its model in place, by a graph of its own, and its steps are replayed."""
    model, (x, y) = network(), images()
    fast = frozen_copy(model, x, dtype=dtype)
    graphs = fast._followed.graphs
    graphs.mode = "always"
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(4):
        found = pgd(fast, x, y, eps=EPS, steps=5, seed=0)
        new = frozen_copy(model, x, dtype=dtype)
        new._followed.graphs = None
        near(found, pgd(new, x, y, eps=EPS, steps=5, seed=0))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    # A step, and the reading of the model.
    assert graphs.captures == 1 and len(graphs) == 2 and not graphs.refusals


def test_a_copy_of_a_training_normalizes_and_rounds_images_at_once():
    layers = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), 3), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()
    model, (x, _) = nn.Sequential(*layers, nn.Linear(8 * 900, 10)).to(DEVICE).eval(), images()
    made = copy_or_model(model, x, torch.bfloat16, fine=False)
    wanted, found = model(x).detach(), made(x)
    assert made is not model and float((found - wanted).norm() / wanted.norm()) < 0.02


STEPS = {PGD: {"steps": 40}, APGD: {"steps": 40}, FABT: {"steps": 20, "n_target_classes": 2}, Square: {"n_queries": 80}}


@pytest.mark.parametrize("kind", STEPS)
def test_an_evaluation_with_graphs_gives_the_rows_of_one_without(kind, monkeypatch):
    model, (x, y), captures = network(), images(16), []
    monkeypatch.setattr(StepGraphs, "log", lambda graphs, *given: captures.append(given))
    y, found = model(x).argmax(1), {}
    for mode in ("off", "auto"):
        how = {"attacks": [kind(**STEPS[kind])], "eps": 2 / 255, "progress": False, "probes": False, "batch_size": 16}
        report = evaluate(model, x, y, **how, config=EvaluateConfig(cuda_graphs=mode))
        found[mode] = torch.tensor(report.rows[-1].robust).float()
        assert bool(captures) == (mode == "auto")
    assert float((found["auto"] - found["off"]).abs().mean()) <= 0.1


def test_a_diffusion_purifier_that_keeps_what_memory_allows():
    defence = denoisers.defence(process=Process(t_star=0.1, steps=3), samples=2).to(DEVICE).eval()
    x, y = (each.to(DEVICE) for each in images_and_labels(4, (3, 8, 12), 10))
    assert defence.keep == "auto"
    found = []
    for graphs in (None, StepGraphs("always")):
        torch.manual_seed(0)
        found.append(PGD(steps=4).run(defence, x, y, AttackContext(eps=EPS, seed=0, graphs=graphs)).images)
        assert graphs is None or (graphs.captures and not graphs.refusals)
    near(*found)


def test_ranges_of_pixels_and_radii_are_inputs_of_one_graph():
    model, (x, y) = network(), images()
    fast = frozen_copy(model, x, dtype=torch.float32)
    graphs, x = fast._followed.graphs, x.clamp(0.2, 0.8)
    graphs.mode = "always"
    for low, eps in ((0.0, 0.02), (0.1, 0.03), (0.2, 0.05)):
        how = {"clip_min": torch.full((3, 1, 1), low, device=DEVICE), "clip_max": torch.ones(3, 1, 1, device=DEVICE)}
        how |= {"eps": torch.full((3, 1, 1), eps, device=DEVICE), "steps": 4, "seed": 0}
        near(pgd(fast, x, y, **how), pgd(model, x, y, **how))
    assert graphs.captures == 1 and not graphs.refusals


def trained(graphs: str, tmp_path, objective: str | None = None, **options) -> dict[str, Tensor]:
    x, y = images_and_labels(32, SHAPE, 10)
    x = (x * 255).to(torch.uint8)
    config = ClassifierConfig(objective=objective, attack=attack(eps=EPS, steps=4))
    task = ClassifierTask(network().train(), config)
    settings = FitConfig(4, 16, cuda_graphs=graphs, **options)
    task.graphs = None if graphs == "off" else StepGraphs(graphs)
    fit(task, x, y, settings, tmp_path / graphs, progress=False, validation=(x[:8], y[:8]))
    assert task.graphs is None or (task.graphs.captures and not task.graphs.refusals)
    return {name: value.double().cpu() for name, value in task.model.state_dict().items()}


def alike(found: dict[str, Tensor], wanted: dict[str, Tensor], allowed: float) -> None:
    for name, value in wanted.items():
        if value.dim() > 1:
            assert float((found[name] - value).norm() / value.norm()) <= allowed, name


@pytest.mark.parametrize("objective", [None, "trades", "mart"])
def test_classifiers_train_alike_with_graphs_and_a_validation_between_replays(objective, tmp_path):
    """With fused optimizers on a GPU, whose moments are laid out like the weights."""
    off, auto = (trained(mode, tmp_path, objective) for mode in ("off", "auto"))
    alike(auto, off, 0.02)


@pytest.fixture
def compiler(monkeypatch):
    # A CPU traces what a GPU's compiler gets, and compiles nothing.
    if DEVICE.type != "cuda":
        monkeypatch.setattr(compiled_step, "BACKEND", "aot_eager")
    torch._dynamo.reset()


def test_a_compiled_attack_on_a_copy(compiler):
    model, (x, y) = network(), images()
    fast, plain = (frozen_copy(model, x, dtype=torch.bfloat16, compile=compiles) for compiles in (True, False))
    plain._followed.graphs = None
    wanted = pgd(plain, x, y, eps=EPS, steps=4, random_start=False)
    for _ in range(2):
        found = pgd(fast, x, y, eps=EPS, steps=4, random_start=False)
    assert not fast.steps.refusal and fast.steps.checked
    clean, *attacked = (nn.functional.cross_entropy(model(images), y).item() for images in (x, found, wanted))
    assert attacked[0] - clean == pytest.approx(attacked[1] - clean, rel=0.1)


def test_a_compiled_training(compiler, tmp_path):
    alike(trained("off", tmp_path / "compiled", compile=True), trained("off", tmp_path), 0.05)
