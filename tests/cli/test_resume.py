"""A run says what it is from its first second, and `train --resume FOLDER` continues it."""

import pytest
import torch
import yaml
from small_runs import StopAt, Stopped

from purify_fast import training
from purify_fast.training import load_classifier


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
    assert run(*words, "--out", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_resumed_is_named(run, tmp_path):
    code, printed = run("train", "--resume")
    assert code == 2 and "--resume needs a folder" in printed
    code, printed = run("train", "--resume", tmp_path / "none")
    assert code == 2 and f"with its run.yaml, but {tmp_path / 'none'} does not exist" in printed
    (tmp_path / "run.yaml").write_text("command: evaluate\n")
    (tmp_path / "report.json").write_text("{}")
    assert f"but {tmp_path} holds a report" in run("train", "--resume", tmp_path)[1]
