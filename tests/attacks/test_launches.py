"""The launches of one `standard` run without graphs and with them; a replay counts as one."""

import functools
import importlib
from collections import Counter

import pytest
import torch
from cuda_launches import CudaLaunches
from small_models import Made
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from purify_fast.evaluation import EvaluateConfig, evaluate
from purify_fast.judge.searches.engine import judge, row_batches
from purify_fast.ops.dispatch import registry
from purify_fast.speed import StepGraphs

# The package has functions of these names.
square, fab = (importlib.import_module(f"purify_fast.judge.searches.{name}") for name in ("square", "fab"))
#: The parts of an evaluation that are captured as a whole, and the methods that do them.
PARTS = {
    "rounds of Square": (square._SquareSearch, "run"),
    "steps of FAB": (fab._FabSearch, "run"),
    "captures": (StepGraphs, "_make"),
}
WHOLE = "the whole run"
#: The ways to run, as the setting ``cuda_graphs`` names them.
WAYS = ("off", "always")


def subject() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that launches as many operators as a ResNet-18, and 1,000 images, which it classifies correctly."""
    torch.manual_seed(0)
    block = lambda self, x: torch.add(x, torch.relu(self.linear(x)), alpha=0.1)  # noqa: E731
    blocks = (Made(block, linear=nn.Linear(16, 16)) for _ in range(20))
    model = nn.Sequential(nn.Flatten(), *blocks, nn.Linear(16, 3)).eval()
    x = torch.rand(1000, 1, 4, 4)
    with torch.no_grad():
        model[-1].bias -= model(x).mean(0)
        return model, x, model(x).argmax(1)


def counted(way: str, rerun, monkeypatch) -> tuple[Counter[str], Tensor]:
    """The launches of each part of a run, and which images withstood."""
    launches, parts = CudaLaunches(), Counter()

    def of_part(part: str, function):
        def noting(*given, **options):
            before, inner = launches.count, parts.total()
            try:
                return function(*given, **options)
            finally:
                # Parts within this part count for themselves.
                parts[part] += launches.count - before - (parts.total() - inner)

        return noting

    def record(run, device, made=rerun.record):
        again = made(run, device)

        def replay() -> None:
            launches.by_name["replay"] = launches.by_name.get("replay", 0) + 1
            with _disable_current_modes():
                again()

        return replay

    with monkeypatch.context() as patch:
        # As on a GPU, kernels serve, and a batch takes few sizes only.
        patch.setattr(registry.Op, "uses_reference", lambda *given: False)
        for module in (judge, row_batches, square):
            patch.setattr(module, "takes_every_size", lambda device: False)
        patch.setattr(rerun, "record", record)
        make = functools.partial(StepGraphs, capture=rerun)
        patch.setattr("purify_fast.speed.graphs.step_graphs.StepGraphs", make)
        for part, (kind, name) in PARTS.items():
            patch.setattr(kind, name, of_part(part, getattr(kind, name)))
        model, x, y = subject()
        with launches:
            options = {"eps": 0.15, "protocol": "standard", "batch_size": 1000, "progress": False}
            report = evaluate(model, x, y, config=EvaluateConfig(cuda_graphs=way), probes=False, **options)
    parts[WHOLE] = launches.count - parts["captures"]
    return parts, torch.from_numpy(report.headline.robust)


@pytest.mark.slow
def test_what_a_standard_run_launches(rerun, monkeypatch):
    (before, withstood), (after, same) = (counted(way, rerun, monkeypatch) for way in WAYS)
    assert torch.equal(withstood, same) and 0 < int(withstood.sum()) < 100
    assert before["captures"] == 0 < after["captures"] and rerun.recorded > 10 < rerun.replayed
    for part in ("rounds of Square", "steps of FAB"):
        assert 1000 < 10 * after[part] <= before[part], part
    # What is left is Auto-PGD beside its gradients.
    assert 4 * after[WHOLE] < before[WHOLE]
