"""Every example runs to its end with small settings, and says what it is to say; none reads a network."""

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

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
