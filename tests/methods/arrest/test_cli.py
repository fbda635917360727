"""ARREST on the command line: trained on a classifier, resumed, built upon; and what is refused."""

import json

import pytest
import torch

import purify_fast
from purify_fast import cli
from purify_fast._tensors import weights_fingerprint
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import load_classifier, save_classifier

FEW = ["--eps", "0.2", "--alpha", "0.1", "--steps", "2", "--epochs", "1", "--batch-size", "256"]


def run(out, *options, what="arrest", data="digits"):
    """``train arrest`` for an epoch of five steps; the exit status."""
    arguments = ["train", what, "--out", str(out), "--data", str(data), "--device", "cpu", *FEW, *options]
    if what != "arrest":
        arguments = [a for i, a in enumerate(arguments) if a != "--alpha" and arguments[i - 1] != "--alpha"]
    return cli.main(arguments)


def said(capsys):
    """The printed text, without a frame's lines and the line ends."""
    captured = capsys.readouterr()
    return " ".join((captured.err + captured.out).replace("│", " ").split())


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    """A folder with a classifier for the digits."""
    folder = tmp_path_factory.mktemp("standard")
    torch.manual_seed(0)
    save_classifier(SmallCNN(width=4), folder)
    return folder


def test_a_classifier_and_a_defence_on_it(standard, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PURIFY_FAST_DATA", raising=False)
    out = tmp_path / "arrest"
    options = ["--classifier", str(standard), "--distillation-weight", "3", "--tau", "0.01"]
    assert run(out, *options) == 0
    text = said(capsys)
    assert text.endswith(f"saved to {out}; attack it with: purify-fast evaluate {out} --data digits")
    logged = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert logged["step"] == 5 and {"cross_entropy", "accuracy", "distance", "replayed"} <= logged.keys()
    assert logged["loss"] == pytest.approx(logged["cross_entropy"] + 3 * logged["distance"], rel=1e-4)
    trained = load_classifier(out)
    assert type(trained) is SmallCNN and trained.arguments["width"] == 4
    assert weights_fingerprint(load_classifier(standard)) != weights_fingerprint(trained)

    assert run(out, *options) == 0  # it is finished
    assert weights_fingerprint(load_classifier(out)) == weights_fingerprint(trained)
    assert run(out, *options, "--distillation-weight", "4") == 2
    assert "holds a run with other images or settings (distillation_weight: 3.0, now 4.0)" in said(capsys)

    carso = f"--classifier {out} --layers conv2 hidden --cond-dim 4 --latent-dim 2 --samples 2 --decoder-width 2"
    assert run(tmp_path / "carso", *carso.split(), "--kl-delay", "0", what="carso") == 0
    defence = purify_fast.load_defence(tmp_path / "carso")
    assert weights_fingerprint(defence.classifier) == weights_fingerprint(trained)
    few = ["--images", "4", "--steps", "2", "--protocol", "fast", "--device", "cpu"]
    assert cli.main(["evaluate", str(out), *few]) == 0
    assert (out / "evaluation" / "report.md").is_file()


def test_on_a_given_classifier_with_every_setting(standard, tmp_path):
    """A learning rate of 0 keeps its weights, so that it was the start; else they move."""
    before = weights_fingerprint(load_classifier(standard))
    options = ["--classifier", str(standard), "--layers", "conv4", "hidden", "--pooled"]
    options += ["--ema-decay", "0.5", "--precision", "bfloat16"]
    options += ["--distance", "cosine", "--angle", "10"]
    options += ["--optimizer", "adamw", "--schedule", "one_cycle", "--drift-mode", "train", "--eps-warmup", "0.5"]
    assert run(tmp_path / "moved", *options) == 0
    assert weights_fingerprint(load_classifier(tmp_path / "moved")) != before
    assert run(tmp_path / "still", "--classifier", str(standard), "--learning-rate", "0", "--weight-decay", "0") == 0
    assert all(weights_fingerprint(load_classifier(folder)) == before for folder in (tmp_path / "still", standard))
    bare = ["--norm", "l2", "--no-replay", "--distillation-weight", "0"]
    assert run(tmp_path / "l2", "--classifier", str(standard), *bare) == 0
