"""`purify-fast evaluate` of a function of the user's own."""

import json
import sys
from pathlib import Path

import pytest

from purify_fast.cli.evaluate import Evaluate

MINE = """
import beside
import torch


class Net(torch.nn.Module):
    def forward(self, x):
        return beside.SIZE * torch.stack([x[:, 0, :8].mean((1, 2)), x[:, 0, 8:].mean((1, 2))], 1)


def make():
    return Net()


def function():
    return lambda x: Net()(x)


def lazy():
    def model(x):
        import helps

        return helps.logits(x)

    return model
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a file of the user's own, and a module beside it."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "my_defence.py").write_text(MINE)
    (folder / "beside.py").write_text("SIZE = 9.0\n")
    (folder / "helps.py").write_text("def logits(x):\n    return x.flatten(1)[:, :2]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield folder
    for name, module in list(sys.modules.items()):
        if name not in before and str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_file_of_the_users_own_is_evaluated(run, bars, mine):
    few = ["--data", bars, "--device", "cpu", "--steps", "2", "--protocol", "fast", "--images", "100000"]
    code, printed = run("evaluate", "code/my_defence.py:make", *few, "--eps", "0.1")
    out = mine.parent / "runs/own/code.my_defence.make/evaluation"
    assert code == 0 and (out / "report.html").is_file() and (out / "run.yaml").is_file(), printed
    report = json.loads((out / "report.json").read_text())
    assert report["rows"][0]["model"] == "code.my_defence.make" and report["rows"][0]["accuracy"] == 1.0
    assert "all 8 held-out images, which are fewer than --images 100000" in report["notes"]
    # the same command by its file, in which finished rows are used again
    code, printed = run("evaluate", "--config", out / "run.yaml")
    assert code == 0 and "from the cache" in printed


@pytest.mark.parametrize("spec", [":make", ":Net", ":function", ".py:Net"])
def test_every_form_is_found(bars, mine, monkeypatch, spec):
    monkeypatch.chdir(mine)
    place = "../code/my_defence" if spec.startswith(".py") else "my_defence"
    command = Evaluate(data=bars, device="cpu", folder=Path(place + spec))
    images = command.load_data()
    model, base = command.loaded(images)
    assert (model(images.x_test[:].float() / 255).argmax(1) == images.y_test).all() and base is None


def test_a_folder_has_its_name_also_from_inside(tmp_path, monkeypatch):
    (tmp_path / "runs" / "c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "c")
    assert {Evaluate(folder=Path(word)).title() for word in (".", "../c", "../../runs/c")} == {"c"}


def test_files_of_one_name_have_reports_of_their_own():
    specs = ("a/model.py:make", "b/model.py:make", "model.py:make", "model:make")
    written = [Evaluate(folder=Path(spec)).writes() for spec in specs]
    assert len(set(written)) == 3 and written[2] == Path("runs/own/model.make/evaluation")
