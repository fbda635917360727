"""The command line: a folder of pictures end to end, recipes, reports, and the images that are chosen. The tests of
`--help` and `info`, and of data and models of a user's own, follow."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import kill_at_call, together
from PIL import Image

import purify_fast
from purify_fast import _library, cli
from purify_fast.cli import installation
from purify_fast.cli.evaluate import Evaluate
from purify_fast.evaluation import Report
from purify_fast.methods.recipes import recipe
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import records, verify
from purify_fast.training import load_classifier, loop
from purify_fast.training.run import CHECKPOINT, read_tree


def test_a_folder_of_pictures_from_the_data_root(run, tmp_path, monkeypatch):
    for part, n in (("train", 16), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(n):
                levels = np.full((20, 30, 3), 6 * i + 150 * label, np.uint8)
                Image.fromarray(levels).save(tmp_path / "set" / part / name / f"{i}.png")
    monkeypatch.setenv("PURIFY_FAST_DATA", str(tmp_path))
    common = ["--data", "set", "--size", "12", "8", "--stream", "--cache", tmp_path / "c", "--device", "cpu"]
    train = [*common, "--model", "small_cnn", "--width", "4", "--epochs", "8", "--batch-size", "8"]
    code, said = run("train", "classifier", "--out", tmp_path / "out", *train)
    assert code == 0 and "accuracy without an attack: 100.0 ± 0.0 % (standard error) of 8 held-out images" in said
    assert len([*(tmp_path / "c").glob("set-*/12x8/.lock")]) == 1
    assert load_classifier(tmp_path / "out").arguments["image_size"] == [12, 8]
    few = ["--images", "8", "--steps", "2", "--eot-iter", "1", "--protocol", "fast", "--eps", "0.01"]
    assert run("evaluate", tmp_path / "out", *common, *few)[0] == 0
    assert Report.from_json((tmp_path / "out/evaluation/report.json").read_text()).row("clean").robust.all()


def test_a_recipe_gives_the_defaults_and_explicit_options_win(monkeypatch):
    seen = []
    monkeypatch.setattr(cli._KINDS["train carso"], "run", lambda self: seen.append(self))
    assert cli.main(["train", "carso", "--recipe", "cifar10"]) == 0
    assert cli.main(["train", "carso", "--recipe=tiny_imagenet", "--official-code", "--optimizer", "adamw"]) == 0
    assert cli.main(["train", "carso", "--alpha", "None", "--samples", "3", "--recipe", "cifar100"]) == 0
    assert cli.main(["train", "carso", "--recipe", "cifar100", "--official_code", "--recipe", "cifar10"]) == 0
    monkeypatch.setattr(cli._KINDS["train atop"], "run", lambda self: seen.append(self))
    assert cli.main(["train", "atop", "--recipe", "cifar_rt2", "--width", "4"]) == 0
    plain, official, changed, underscored, atop = seen
    assert (atop.size, atop.width, atop.block, atop.sigma, atop.transform) == ((256, 256), 4, None, 0.25, "rt2")
    made = recipe("carso/cifar10")
    assert underscored.recipe == "cifar10" and underscored.method == made.config(official_code=True)
    assert plain.method == made.config() and plain.loop == made.loop() and plain.layers == made["defence.layers"]
    assert plain.data == "cifar10" and (plain.cond_dim, plain.latent_dim, plain.samples) == (512, 128, 8)
    assert official.method == dataclasses.replace(recipe("carso/tiny_imagenet").config(True), optimizer="adamw")
    assert changed.method.attack.alpha is None and changed.samples == 3 and changed.method.attack.eps == 8 / 255


def test_a_report_of_another_radius_is_told_of(run, tmp_path):
    common = ["evaluate", "zoo:digits-pgd-at", "--protocol", "fast", "--images", "4"]
    common += ["--steps", "1", "--probes", "False"]
    for eps, told in (("0.2", False), ("0.2", False), ("0.1", True)):
        code, said = run(*common, "--eps", eps, "--out", tmp_path)
        assert code == 0, said
        assert ("this replaced the report L-inf 0.2 fast, whose work is kept" in said) == told


def test_certificates_of_other_radii_are_told_of(run, tmp_path):
    common = ["certify", "zoo:digits-smoothed", "--images", "2", "--draws", "100", "--out", tmp_path, "--radius"]
    for radius, told in (("0.1", False), ("0.1", False), ("0.2", True)):
        code, said = run(*common, radius)
        assert code == 0 and ("this replaced the report of sigma 0.25, radii [0.1], whose work" in said) == told, said


def test_evaluate_takes_equally_many_images_of_every_class():
    y = torch.arange(6).repeat_interleave(10)
    images = SimpleNamespace(x_test=torch.arange(60).view(60, 1, 1, 1), y_test=y, num_classes=7)
    (x, labels, ids), notes = Evaluate(images=12).chosen(images, 0)
    assert torch.equal(x.flatten(), ids)
    assert labels.bincount().tolist() == [2] * 6 and torch.equal(y[x.flatten()], labels)
    assert notes[1].startswith("1 of 7 classes have no image among the 12 chosen images (6)")
    (x, labels, ids), notes = Evaluate(images=60).chosen(images, 0)
    assert torch.equal(x, images.x_test) and torch.equal(labels, y) and torch.equal(ids, torch.arange(60))
    assert notes == ["all 60 held-out images"]
    assert "which are fewer than --images 61" in Evaluate(images=61).chosen(images, 0)[1][0]


# -- --help and info ---------------------------------------------------------------------------------------------------
# --help comes at once, without PyTorch, and `info` tells what is installed.

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(cli._KINDS)


def test_help_comes_without_pytorch():
    """For every command, in one process: what one of them imported would be seen after the next."""
    code = f"""
import sys
from purify_fast import cli
for name in {[*NAMES, "", "train"]!r}:
    try:
        cli.main([*name.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    loaded = {{name.split(".")[0] for name in sys.modules}} & {{"torch", "torchvision", "numpy", "tqdm"}}
    assert not loaded, (name, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name in (*NAMES, "", "train"):
        assert f"usage: purify-fast {name}".strip() in done.stdout
    for unread in ("{None}", "[INT", "(default: None)", "(default: )"):
        assert unread not in done.stdout


def test_the_help_of_each_command_ends_with_an_example_that_is_read(monkeypatch, capsys):
    ran = []
    monkeypatch.setenv("COLUMNS", "200")
    for name, kind in cli._KINDS.items():
        with pytest.raises(SystemExit, match="0"):
            cli.main([*name.split(), "--help"])
        *_, example, pages = capsys.readouterr().out.splitlines()
        assert example.startswith(f"Example: purify-fast {name} ") and pages.startswith("Pages: https://")
        monkeypatch.setattr(kind, "run", lambda self: ran.append(self))
        monkeypatch.setattr(kind, "writes", lambda self: None)
        assert cli.main(shlex.split(example)[2:]) == 0
    assert len(ran) == len(cli._KINDS)


def test_the_program_is_run_as_a_module_and_tells_its_version():
    command = [sys.executable, "-m", "purify_fast", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout == "purify-fast 0.1.0\n"


CPU = torch.device("cpu")


def rows_of(text):
    """Return the text of each op. A line that begins with spaces continues the line before."""
    rows = [" ".join(row.split()) for row in re.split(r"\n(?=\S)", text)]
    return {row.split()[0]: row for row in rows if row}


@pytest.mark.skipif(not _library.loaded(), reason="the CPU's kernels are the extension's")
def test_report_says_what_was_verified_and_what_is_wrong(tmp_path, monkeypatch, kernel_cache):
    rows = rows_of(installation.info(True))
    assert "cpp" in rows["philox"] and "verified at first use" in rows["philox"]
    verdicts = {name: verify.verdict_of(REGISTRY[name], CPU) for name in ("philox", "stitch")}
    verdicts["stitch"] = dataclasses.replace(verdicts["stitch"], error=0.25, budget=0.0, case="3x3x32x32, float32")
    sources = {name: REGISTRY[name].code_hash("cpu") for name in verdicts}
    records.update(CPU, {n: {"sources": sources[n], "verdict": dataclasses.asdict(v)} for n, v in verdicts.items()})
    records._contents.clear()
    text = installation.info(True)
    assert "WRONG here, and therefore not used: stitch; please report it" in installation.info(False)
    rows = rows_of(text)
    assert max(map(len, text.partition("aggregate on")[2].splitlines())) <= 100
    assert f"verified {verdicts['philox'].date[:10]}, error " in rows["philox"]
    assert "the cpp kernel is WRONG here: an error of 0.25 where 0 is allowed (3x3x32x32, float32)" in rows["stitch"]
    assert str(tmp_path) in text.partition("verdicts")[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PURIFY_FAST_EXTENSION", "PURIFY_FAST_NO_EXTENSION"])
def test_an_extension_that_is_absent_or_broken_is_told(tmp_path, name):
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    value, why = ("1", "switched off by") if name.startswith("PURIFY_FAST_NO") else (str(broken), str(broken))
    command, environment = [sys.executable, "-m", "purify_fast", "info", "--all"], {**os.environ, name: value}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    text = " ".join(done.stdout.split())
    assert f"{name}={value}" in text.split("environment ")[1], done.stderr
    assert "the extension is not loaded" in text and why in text


# -- data of a user's own ----------------------------------------------------------------------------------------------
# Each method's command on data of a user's own, by the method's recipe: killed, resumed, saved and loaded.

#: Options that make the networks and the attacks small. A delayed term of the loss acts from the first step. AToP's
#: recipe resizes images to 256 x 256 by default.
SMALL = {
    "carso": "--recipe cifar10 --layers conv2 hidden --cond-dim 8 --latent-dim 4 --samples 2 --steps 1 --alpha None "
    "--kl-delay 0",
    "atop": "--recipe cifar_rt2 --width 4 --discriminator-width 4 --cls-delay 0 --size 16 24",
    "arrest": "--recipe resnet18 --steps 1 --alpha None",
}
#: The optimizer of CARSO's recipe moves the weights that are saved only at every sixth step.
LENGTH = "--batch-size 8 --epochs 2 --steps-per-epoch 3 --checkpoint-seconds 0"


def train(method, place, out, options):
    words = f"train {method} {options} --data {place}/own.npz --device cpu --out {out}"
    return cli.main(words.split())


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with images that are not square, and a classifier that was trained on them."""
    place = tmp_path_factory.mktemp("own")
    x, y = np.random.RandomState(0).randint(0, 256, (24, 16, 24)).astype(np.uint8), np.arange(24) % 3
    np.savez(place / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    options = "--model small_cnn --width 4 --epochs 1 --batch-size 8"
    assert train("classifier", place, place / "classifier", options) == 0
    return place


METHODS = [pytest.param(name, marks=pytest.mark.slow if name != "arrest" else ()) for name in SMALL]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_on_own_data_is_killed_and_resumed(own, method, tmp_path):
    def trained(name):
        return train(method, own, tmp_path / name, f"{SMALL[method]} {LENGTH} --classifier {own}/classifier")

    ended = together(tmp_path, 1, lambda: kill_at_call(loop, "train_step", 4) or trained("resumed"), None)
    assert ended.codes == [-signal.SIGKILL], ended.errors
    assert read_tree(tmp_path / "resumed" / CHECKPOINT)["step"] == 3 and trained("resumed") == trained("whole") == 0
    load = load_classifier if method == "arrest" else purify_fast.load_defence
    one, other = (load(tmp_path / name).eval() for name in ("resumed", "whole"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert one(torch.rand(2, 1, 16, 24)).shape == (2, 3)


# -- models of a user's own --------------------------------------------------------------------------------------------
# `purify-fast evaluate` of a function of the user's own.

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
