"""The command line end to end on a set of the user's own: two classes, grey, not square, in a .npz file."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import write_bars
from PIL import Image

import purify_fast
from purify_fast import cli
from purify_fast.cli.evaluate import Evaluate
from purify_fast.evaluation import Report
from purify_fast.methods.recipes import recipe
from purify_fast.training import load_classifier

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("data") / "bars.npz", 128, 24, 12, 8)


@pytest.mark.slow
def test_train_and_evaluate(npz, tmp_path, capsys, monkeypatch, short_signs):
    monkeypatch.delenv("PURIFY_FAST_DATA", raising=False)
    classifier, carso = str(tmp_path / "classifier"), str(tmp_path / "carso")
    common = ["--data", npz, "--device", "cpu", "--batch-size", "32"]
    train = ["--eps", "0.1", "--steps", "2", *common]
    assert cli.main(["train", "classifier", "--out", classifier, "--width", "4", "--epochs", "8", *train]) == 0
    assert "accuracy without an attack: " in capsys.readouterr().out
    paths = ["--classifier", classifier, "--out", carso, "--layers", "conv2", "hidden"]
    assert cli.main(["train", "carso", *paths, "--epochs", "3", *train]) == 0
    said = capsys.readouterr().out
    assert f"saved to {carso}; attack it with: purify-fast evaluate {carso} --data {npz}\n" in said
    fine = [*paths[:3], carso + "-fine", "--init", carso, *["--attack-target", "pipeline", "--precision", "bfloat16"]]
    assert cli.main(["train", "carso", *fine, "--epochs", "1", *train]) == 0
    evaluate = ["--data", npz, "--device", "cpu", "--eps", "0.1", "--images", "4", "--steps", "2", "--eot-iter", "2"]
    assert cli.main(["evaluate", carso + "-fine", *evaluate, "--protocol", "fast"]) == 0
    assert "transfer from the base" in capsys.readouterr().out
    rounded = ["--precision", "bfloat16", "--protocol", "fast"]
    assert cli.main(["evaluate", carso, *evaluate, *rounded]) == 0
    assert "precision bfloat16" in capsys.readouterr().out
    for folder, precision in ((carso, "bfloat16"), (carso + "-fine", None)):
        assert json.loads((Path(folder) / "evaluation/report.json").read_text())["about"].get("precision") == precision
    assert cli.main(["evaluate", classifier, *evaluate, *rounded]) == 2
    assert "--precision bfloat16 is only for defences" in capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "carso" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [0, 1, 2] and log[-1]["images_per_second"] > 0


def test_a_folder_of_pictures_streamed_from_the_data_root(tmp_path, capsys, monkeypatch):
    state = np.random.RandomState(0)
    for part, n in (("train", 16), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(n):
                levels = state.randint(0, 100, (20, 30, 3)) + 150 * label
                Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "set" / part / name / f"{i}.png")
    monkeypatch.setenv("PURIFY_FAST_DATA", str(tmp_path))
    common = ["--data", "set", "--size", "12", "8", "--stream", "--cache", str(tmp_path / "c"), "--device", "cpu"]
    train = [*common, "--width", "4", "--epochs", "8", "--batch-size", "8"]
    out = str(tmp_path / "out")
    assert cli.main(["train", "classifier", "--out", out, *train]) == 0
    said = capsys.readouterr().out
    assert "accuracy without an attack: 100.0 ± 0.0 % of 8 held-out images\n" in said and "Robustness" not in said
    assert (tmp_path / "c" / "set" / "12x8" / ".lock").is_file()
    few = ["--images", "8", "--steps", "2", "--eot-iter", "1", "--protocol", "fast", "--eps", "0.01"]
    assert cli.main(["evaluate", out, *common, *few]) == 0
    assert Report.from_json((tmp_path / "out" / "evaluation" / "report.json").read_text()).row("clean").robust.all()


def test_a_recipe_gives_the_defaults_and_explicit_options_win(monkeypatch):
    seen = []
    monkeypatch.setattr(cli._KINDS["train carso"], "run", lambda self: seen.append(self))
    assert cli.main(["train", "carso", "--recipe", "cifar10"]) == 0
    assert cli.main(["train", "carso", "--recipe=tiny_imagenet", "--official-code", "--optimizer", "adamw"]) == 0
    assert cli.main(["train", "carso", "--alpha", "None", "--samples", "3", "--recipe", "mnist_v1"]) == 0
    assert cli.main(["train", "carso", "--recipe", "mnist_v1", "--official_code", "--recipe", "cifar10"]) == 0
    plain, official, changed, underscored = seen
    made = recipe("carso/cifar10")
    assert underscored.recipe == "cifar10" and underscored.method == made.config(official_code=True)
    assert plain.method == made.config() and plain.loop == made.loop() and plain.layers == made["defence.layers"]
    assert plain.data == "cifar10"
    assert (plain.cond_dim, plain.latent_dim, plain.samples) == (512, 128, 8)
    assert official.method == dataclasses.replace(recipe("carso/tiny_imagenet").config(True), optimizer="adamw")
    assert changed.method.attack.alpha is None and changed.samples == 3 and changed.method.attack.eps == 0.3


def test_a_recipe_is_trained_on_the_users_data(tmp_path):
    state = np.random.RandomState(0)
    x, y = state.randint(0, 256, (40, 28, 28)).astype(np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "small.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    common = ["--data", str(tmp_path / "small.npz"), "--device", "cpu"]
    folder = ["--classifier", str(tmp_path / "classifier"), "--out", str(tmp_path / "carso")]
    train = ["train", "classifier", "--out", str(tmp_path / "classifier"), "--model", "fully_connected"]
    assert cli.main([*train, "--epochs", "1", "--batch-size", "20", *common]) == 0
    assert load_classifier(tmp_path / "classifier").arguments["mean"] == pytest.approx([x.mean() / 255])
    preset = ["train", "carso", "--recipe", "mnist_v1", *folder, "--steps", "1", "--epochs", "1", "--batch-size", "20"]
    assert cli.main([*preset, *common]) == 0
    defence = purify_fast.load_defence(tmp_path / "carso")
    assert defence.arguments["version"] == "v1" and defence.samples == 4
    np.savez(tmp_path / "few.npz", x_train=x, y_train=y % 3, x_test=x, y_test=y % 3)
    few = ["--data", str(tmp_path / "few.npz"), "--device", "cpu"]
    own = ["--classifier", str(tmp_path / "three"), "--out", str(tmp_path / "own")]
    own += ["--batch-size", "20", "--epochs", "1", "--steps", "1"]
    assert cli.main(["train", "classifier", "--out", str(tmp_path / "three"), *own[4:], *few]) == 0
    assert cli.main(["train", "carso", "--recipe", "mnist_v1", *own, "--layers", "conv1", *few]) == 0
    assert purify_fast.load_defence(tmp_path / "own").num_classes == 3


@pytest.mark.slow
def test_atop_is_trained_by_a_recipe_at_its_size(tmp_path, capsys):
    """The command's own images, resized to 256 x 256, and a shortened schedule; a delay of all of it is refused."""
    x, y = np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8), np.arange(12) % 10
    np.savez(tmp_path / "small.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    common = ["--data", str(tmp_path / "small.npz"), "--num-classes", "10", "--device", "cpu"]
    base = str(tmp_path / "classifier")
    network = ["--model", "preact_resnet18", "--width", "2", "--size", "256", "--epochs", "1", "--batch-size", "4"]
    assert cli.main(["train", "classifier", "--out", base, *network, *common]) == 0
    short = ["--width", "4", "--steps-per-epoch", "1", "--batch-size", "2", "--out", str(tmp_path / "atop")]
    atop = ["train", "atop", "--recipe", "cifar_rt2", "--classifier", base, *short, *common]
    assert cli.main([*atop, "--epochs", "2"]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "cls_delay is too long: its term would begin in step 3 of 2" in said
    assert cli.main([*atop, "--epochs", "3"]) == 0
    defence = purify_fast.load_defence(tmp_path / "atop")
    assert defence.image_shape == (3, 256, 256)
    assert (defence.block, defence.sigma, defence.transform) == (32, 0.25, "rt2")


def test_recipes_are_listed_and_printed(capsys):
    assert cli.main(["recipe"]) == 0
    listed = capsys.readouterr().out
    assert "atop/cifar_rt2" in listed and "arrest/wrn_34_10" in listed
    assert cli.main(["recipe", "carso/cifar10"]) == 0
    assert "src/train_a.py:107" in capsys.readouterr().out


def test_the_shell_is_completed(tmp_path, capsys):
    for shell in ("bash", "zsh"):
        with pytest.raises(SystemExit) as end:
            cli.main(["--tyro-write-completion", shell, str(tmp_path / shell)])
        assert end.value.code in (0, None), capsys.readouterr().err
        text = (tmp_path / shell).read_text()
        assert "purify-fast" in text and "evaluate" in text


def test_evaluate_takes_equally_many_images_of_every_class():
    y = torch.arange(6).repeat_interleave(10)
    images = SimpleNamespace(x_test=torch.arange(60).view(60, 1, 1, 1), y_test=y, num_classes=7)
    x, labels, notes = Evaluate(images=12).chosen(images)
    assert labels.bincount().tolist() == [2] * 6 and torch.equal(y[x.flatten()], labels)
    assert notes[0].startswith("12 of the 60 held-out images, chosen by the seed 0;")
    assert notes[1].startswith("1 of 7 classes have no image among the 12 chosen images (6)")
    x, labels, notes = Evaluate(images=60).chosen(images)
    assert torch.equal(x, images.x_test) and torch.equal(labels, y) and notes == ["all 60 held-out images"]
    assert "--images 61 asks for more than there are" in Evaluate(images=61).chosen(images)[2][0]
