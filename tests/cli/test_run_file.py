"""run.yaml: written by every run, read by --config; options on the command line win. The tests of `train --resume`
follow."""

import dataclasses
import json
import shlex

import pytest
import torch
import yaml
from small_runs import StopAt, Stopped

from purify_fast import cli, training
from purify_fast.cli import command as run_file
from purify_fast.cli.command import parse
from purify_fast.cli.evaluate import ball_of
from purify_fast.training import load_classifier

COMMANDS = [
    ["train classifier", "--eps", "8/255", "--norm", "l2", "--flip"],
    ["train carso", "--eps", "0.3", "--layers", "conv2", "--no-flip", "--size", "12", "8"],
    ["train carso", "--recipe", "cifar100", "--samples", "3"],
    ["train generator", "--residual", "--betas", "0.4", "0.9"],
    ["train atop", "--init", "None", "--transform", "rt3", "--shared-mask"],
    ["evaluate", "runs/a folder", "--protocol", "rand", "--eps", "0.1"],
]


def parsed(words):
    return parse(cli._KINDS[words[0]], words[1:])


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_a_run_is_repeated_from_its_file(tmp_path, words):
    command = parsed(words)
    run_file.write_run_file(command, tmp_path)
    path = tmp_path / "run.yaml"
    assert dataclasses.replace(parsed([words[0], "--config", str(path)]), config=None) == command
    held = yaml.safe_load(path.read_text())
    assert held["command"] == words[0] and held["version"] == "0.1.0" and "config" not in held


def test_options_on_the_command_line_win(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("eps: 8/255\nlayers: [conv2]\nbatch-size: 7\nflip: true\n")
    read = parsed(["train carso", "--config", str(path), "--layers", "conv4", "hidden", "--no-flip"])
    assert (read.layers, read.loop.batch_size, read.loop.flip) == (("conv4", "hidden"), 7, False)
    assert read.method.attack.eps == 8 / 255
    # A recipe in a file gives the numbers that the file does not.
    path.write_text("recipe: tiny_imagenet\nsamples: 2\n")
    read = parsed(["train carso", "--config", str(path), "--epochs", "3"])
    assert (read.samples, read.cond_dim, read.loop.epochs, read.loop.batch_size) == (2, 768, 3, 1024)


def test_what_a_file_may_not_hold(run, tmp_path):
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("epochz: 3\n", "epochz"),
        ("command: train atop\n", "is a file of `train atop`, not of `train carso`"),
        ("- 3\n", "must contain a table of options"),
        ("!!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("norm: l3\n", "invalid choice 'l3'"),
    ):
        path.write_text(text)
        code, printed = run("train", "carso", "--config", path)
        assert code == 2 and message in printed and "Traceback" not in printed
    assert "none.yaml" in run("train", "carso", "--config", tmp_path / "none.yaml")[1]


def test_every_run_writes_its_file(run, bars, tmp_path):
    out = tmp_path / "classifier"
    words = ["--data", bars, "--device", "cpu", "--epochs", "1", "--batch-size", "16"]
    words += ["--eps", "0.5", "--norm", "l2", "--steps", "1"]
    assert run("train", "classifier", "--out", out, "--width", "2", *words)[0] == 0
    held = yaml.safe_load((out / "run.yaml").read_text())
    assert (held["eps"], held["width"], held["data"], held["command"]) == (0.5, 2, bars, "train classifier")
    few = ["--data", bars, "--device", "cpu", "--images", "4", "--steps", "1", "--protocol", "fast", "--n-eval", "3"]
    few += ["--probes", "False"]
    assert run("evaluate", out, *few)[0] == 0
    held = yaml.safe_load((out / "evaluation" / "run.yaml").read_text())
    assert (held["command"], held["folder"], held["images"], held["n_eval"]) == ("evaluate", str(out), 4, 3)
    again = ["evaluate", "--config", str(out / "evaluation" / "run.yaml"), "--out", str(tmp_path / "again")]
    assert run(*again)[0] == 0
    assert f"- command: {shlex.join(['purify-fast', *again])}\n" in (tmp_path / "again" / "report.md").read_text()
    assert ball_of(out) == (0.5, "l2")
    assert "--norm linf needs --eps too" in run("evaluate", out, *few, "--norm", "linf")[1]
    # a training that was begun in Python has no such file
    (out / "run.yaml").unlink()
    assert "--eps must be given, such as --eps 8/255" in run("evaluate", out, *few)[1]


def test_the_default_batch_is_at_most_a_sixth_of_the_images(run, bars, tmp_path):
    common = ["--data", bars, "--device", "cpu", "--epochs", "1", "--steps", "1"]
    code, printed = run("train", "classifier", "--width", "2", "--out", tmp_path / "classifier", *common)
    assert code == 0 and "--batch-size 5, by default at most a sixth of the 32 training images" in printed
    held = yaml.safe_load((tmp_path / "classifier" / "run.yaml").read_text())
    assert held["batch_size"] == 5
    given = ["--classifier", tmp_path / "classifier", "--out", tmp_path / "arrest"]
    code, printed = run("train", "arrest", *common, *given)
    assert code == 0 and "--batch-size 5" in printed
    # The rate of ARREST is that of its batch.
    held = yaml.safe_load((tmp_path / "arrest" / "run.yaml").read_text())
    assert held["learning_rate"] == pytest.approx(0.025 * 5 / 128)
    assert json.loads((tmp_path / "arrest" / "log.jsonl").read_text().splitlines()[-1])["step"] == 6
    code, printed = run("train", "classifier", "--batch-size", "16", "--out", tmp_path / "other", *common)
    assert code == 0 and "by default" not in printed


@pytest.mark.parametrize(("eps", "told"), [("0.5", False), ("0.1", True)])
def test_a_training_says_that_its_classifier_has_another_radius(run, bars, tmp_path, eps, told):
    common = ["--data", bars, "--device", "cpu", "--epochs", "1", "--steps", "1"]
    words = ["--width", "2", "--eps", "0.5", "--out", tmp_path / "classifier"]
    assert run("train", "classifier", *words, *common)[0] == 0
    given = ["--classifier", tmp_path / "classifier", "--eps", eps, "--out", tmp_path / "arrest"]
    code, printed = run("train", "arrest", *common, *given)
    text = "its own radius is linf 0.5, and this training attacks within linf 0.1 (--norm, --eps)"
    assert code == 0 and (text in printed) == told


# -- train --resume FOLDER ---------------------------------------------------------------------------------------------
# A run says what it is from its first second, and `train --resume FOLDER` continues it.


@pytest.fixture
def stopped(monkeypatch):
    """Stops a training after a step, as a kill would."""

    def at(step):
        fit = training.fit
        monkeypatch.setattr(training, "fit", lambda *given, **options: fit(*given, **options, callbacks=[StopAt(step)]))

    return at


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_training_is_resumed_by_its_folder(run, bars, tmp_path, stopped, monkeypatch, at):
    words = ["train", "classifier", "--data", bars, "--device", "cpu", "--epochs", "2", "--batch-size", "16"]
    words += ["--width", "2", "--eps", "0.1", "--steps", "1"]
    assert run(*words, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "killed"
    with monkeypatch.context():
        stopped(at)
        with pytest.raises(Stopped):
            run(*words, "--out", out)
        monkeypatch.undo()
    assert yaml.safe_load((out / "run.yaml").read_text())["width"] == 2
    for command in (["evaluate", out], ["check", out], ["train", "arrest", "--data", bars, "--classifier", out]):
        code, printed = run(*command)
        assert code == 2 and f"`purify-fast train --resume {out}`" in printed, printed
    assert run("train", "--resume", out)[0] == 0
    whole, resumed = (load_classifier(tmp_path / name).state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    # Options win over the file.
    code, printed = run("train", "--resume", out, "--epochs", "3")
    assert code == 2 and "holds a run with other images or settings (epochs: 2, now 3)" in printed


def test_a_refused_training_leaves_no_file(run, bars, tmp_path):
    words = ["train", "classifier", "--data", bars, "--device", "cpu", "--batch-size", "16", "--keep-best", "loss"]
    assert run(*words, "--out", tmp_path / "out")[0] == 2 and not (tmp_path / "out").exists()


def test_what_cannot_be_resumed_is_named(run, tmp_path):
    code, printed = run("train", "--resume")
    assert code == 2 and "--resume needs a folder" in printed
    code, printed = run("train", "--resume", tmp_path / "none")
    assert code == 2 and f"with its run.yaml, but {tmp_path / 'none'} does not exist" in printed
    (tmp_path / "run.yaml").write_text("command: evaluate\n")
    (tmp_path / "report.json").write_text("{}")
    assert f"but {tmp_path} holds a report" in run("train", "--resume", tmp_path)[1]
