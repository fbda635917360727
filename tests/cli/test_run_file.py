"""run.yaml: written by every run, read by --config; options on the command line win."""

import dataclasses
import json
import shlex

import pytest
import yaml

from purify_fast import cli
from purify_fast.cli import command as run_file
from purify_fast.cli.command import parse

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
    again = parsed([words[0], "--config", str(path)])
    assert dataclasses.replace(again, config=None) == command
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
    assert run_file.ball_of_run(out) == (0.5, "l2")
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
    rows = (tmp_path / "arrest" / "log.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 6
    code, printed = run("train", "classifier", "--batch-size", "16", "--out", tmp_path / "other", *common)
    assert code == 0 and "by default" not in printed
