"""Every example runs to its end with small settings, and says what it is to say; none reads a network. The tests of
the demonstration and of the denoiser follow."""

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from examples import your_diffusion_loop as example
from examples.demo.methods import ARREST_MODELS, AUTOATTACK, BASE, STANDARD
from examples.demo.setting import Budget
from examples.demo.ten_models import sentences
from purify_fast import load_defence, zoo
from purify_fast.evaluation import Report, Row
from purify_fast.methods.diffusion import Schedule
from purify_fast.models import UNet
from purify_fast.ops import Stream, philox
from purify_fast.training import Batch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
#: The options with which each script runs here, and what its output holds.
SMALL = {
    "arrest_then_carso.py": (["--tiny"], r"CARSO on ARREST: \d"),
    "atop_on_image_folder.py": (["--tiny"], "through SmallCNN"),
    "attacks_in_attackbench.py": (
        ["--images", "10", "--queries", "300"],
        r"\b([1-9]|10) of 10 images fell, .* \d+ queries",
    ),
    "hf_model.py": ([], r"CARSO: \d"),
    "judge_your_defence.py": (["--epochs", "4", "--images", "40"], r"The defence keeps \d+ % .* its base \d+ %"),
    "kernels_in_your_loop.py": ([], r"images differ by 0\n.*\n.*finite: True\n.*batch: True"),
    "lightning_loop.py": ([], r"trained by .*; logits \(2, 10\)"),
    "read_published_weights.py": (["--tiny"], r"through PeeL"),
    "train_carso_cifar10.py": (["--tiny", "--out", "runs"], r"CARSO: \d"),
    "your_diffusion_loop.py": ([], r"one draw: \d.* draws right: \d"),
    "wrap_a_torchvision_model.py": ([], r"saved and loaded: the same predictions"),
}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("an example asks the network for something")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys, no_network):
    options, said = SMALL[name]
    if "attackbench" in name:
        # it would read results of others there
        monkeypatch.setitem(sys.modules, "wandb", mock.MagicMock())
        pytest.importorskip("attackbench")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(said, out), out


@pytest.mark.slow
def test_several_processes(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = ["bash", str(EXAMPLES / "multi_gpu.sh"), "--tiny"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "trained in 2 processes" in done.stdout and (tmp_path / "carso" / "run.yaml").is_file()


def code_cells(notebook):
    return [cell for cell in json.loads((EXAMPLES / notebook).read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_judges_a_defence_and_draws_it(tmp_path, monkeypatch, capsys, no_network, short_signs):
    """Its cells run one after the other as they are, in this process, which needs no kernel of Jupyter."""
    plot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "show", lambda: None)
    plot.switch_backend("Agg")
    plot.close("all")
    scope = {}
    for cell in code_cells("judge_a_defence.ipynb"):
        exec("".join(cell["source"]), scope)
    drawn = [plot.figure(number) for number in plot.get_fignums()]
    plot.close("all")
    assert len(drawn) == 4 and all(figure.axes[0].has_data() for figure in drawn)
    # as its text says: PGD leaves everything that the defence classifies, but not reliably, and a better attack less
    first, report = scope["first"], scope["report"]
    assert first.headline.accuracy == first.row("clean").accuracy and not first.headline.reliable
    assert report.headline.accuracy < first.headline.accuracy - 0.2
    assert all(curve == sorted(curve, reverse=True) for curve in scope["curves"].values())
    assert len(scope["curves"]) == 2 and len(scope["fell"]) == 6
    assert "claim of 70 % robust accuracy: refuted" in capsys.readouterr().out


def test_the_notebook_has_no_outputs():
    for cell in code_cells("judge_a_defence.ipynb"):
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["source"]


def test_every_example_is_tested_and_listed():
    scripts = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")}
    assert scripts == {*SMALL, "multi_gpu.sh", "slurm.sh", "judge_a_defence.ipynb", "random_defence.py"}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}]({name})" in listed for name in scripts)
    for name in SMALL:
        assert f"python examples/{name}" in (EXAMPLES / name).read_text().split('"""')[1], name


# -- the demonstration -------------------------------------------------------------------------------------------------
# The sentences of the demonstration follow the numbers. `.ci/run` runs the demonstration.

N = 8
COMPARED = (STANDARD, BASE, *ARREST_MODELS)


def report(model: str, **rows: int | list[int]) -> Report:
    """A report of rows of N images, of which so many were classified right; a list says which."""
    result = Report()
    for attack, right in {"clean": N, **rows}.items():
        robust = np.array([1] * right + [0] * (N - right) if isinstance(right, int) else right, dtype=bool)
        result.rows.append(Row(model, attack, "x", robust[None], seed=0, data="d"))
    return result


def test_a_sum_is_over_the_images_of_autoattack():
    # a sum needs one set of images: clean accuracy on all of them is another number
    few = {"clean": [1, 1, 1, 0, 1, 1, 1, 1], "worst": 2, AUTOATTACK: [1, 1, 0, 0]}
    lines = sentences("ARREST", {name: [report(name, **few)] for name in COMPARED}, Budget()).splitlines()
    parts = ("87.5 ± 11.7 % of the clean images", "Under PGD, its accuracy is 25.0 ± 15.3 %.")
    parts += ("Under AutoAttack, its accuracy is 50.0 ± 25.0 %", "On the 4 images of AutoAttack")
    assert all(part in each for each in lines[:4] for part in (*parts, "its sum is 125.0 and its NRR 60.0."))


# -- the example that trains a denoiser --------------------------------------------------------------------------------
# The example that trains a denoiser: its loss by hand, its moving average, and a defence from its result.


class Recording(nn.Module):
    """A denoiser of one weight that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        self.x, self.t = x, t
        return self.weight * x


def test_the_loss_is_that_of_the_schedule_of_the_purifier():
    task, n = example.Denoising(Recording()), 6
    x, ids = torch.rand((n, 1, 8, 8), generator=torch.Generator().manual_seed(0)), torch.arange(n) + 100
    loss, _ = task.training_step(Batch(x, torch.zeros(n, dtype=torch.int64), ids, seed=7))
    use = {"seed": torch.tensor([7]), "sample_ids": ids, "stream": Stream.DIFFUSION_TRAINING}
    z = philox(**use, numel=64, distribution="normal").view(n, 1, 8, 8)
    index = (400 * philox(**use, numel=1, first_draw=1).flatten()).floor()
    kept = Schedule().alpha_bar((index + 1) / 1000)[:, None, None, None].float()
    given = task.denoiser
    torch.testing.assert_close(given.x, kept.sqrt() * (2 * x - 1) + (1 - kept).sqrt() * z)
    assert torch.equal(given.t, index.long())
    torch.testing.assert_close(loss, (0.5 * given.x - z).square().mean())


def test_the_result_is_a_moving_average_that_begins_fast():
    task = example.Denoising(nn.Linear(2, 2))
    average = {name: value.clone() for name, value in task.denoiser.state_dict().items()}
    # the share of the old average that stays after n steps
    for kept in [(1 + n) / (10 + n) for n in range(5)]:
        for weight in task.denoiser.parameters():
            weight.data.add_(torch.randn_like(weight))
        task.after_step()
        for name, now in task.denoiser.state_dict().items():
            average[name] = kept * average[name] + (1 - kept) * now
    for name, value in task.result.state_dict().items():
        torch.testing.assert_close(value, average[name])


def test_the_package_purifies_with_its_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "WIDTH", 4)
    example.main(["--train", str(tmp_path), "--epochs", "1"])
    assert f"purify-fast evaluate {tmp_path} --classifier" in capsys.readouterr().out
    defence = load_defence(tmp_path, zoo.load("digits-pgd-at"), process={"steps": 2})
    fresh = UNet(1, 4, patch=2).state_dict()
    assert any(not torch.equal(value, fresh[name]) for name, value in defence.denoiser.module.state_dict().items())
    assert defence(torch.rand(2, 1, 16, 16)).shape == (2, 10)
    with pytest.raises(ValueError, match="t_star must be at most"):
        load_defence(tmp_path, zoo.load("digits-pgd-at"), process={"t_star": 0.5, "steps": 2})
