"""The command line: a folder of pictures end to end, recipes, reports, and the images that are chosen."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from purify_fast import cli
from purify_fast.cli.evaluate import Evaluate
from purify_fast.evaluation import Report
from purify_fast.methods.recipes import recipe
from purify_fast.training import load_classifier


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
    assert plain.data == "cifar10"
    assert (plain.cond_dim, plain.latent_dim, plain.samples) == (512, 128, 8)
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
