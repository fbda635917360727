"""Classifiers by name: of torchvision, of timm, by import path; trained, saved, loaded, built upon."""

import argparse
import importlib.util
import sys

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from purify_fast._settings import weights_fingerprint
from purify_fast.models.classifiers import ForeignClassifier, build_foreign, read_weights
from purify_fast.training import load_classifier, save_classifier

MINE = """
import torch


def trained():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def nothing():
    return 3
"""
NAMED = "torchvision:shufflenet_v2_x0_5"


def networks():
    """A network of torchvision, and another."""
    torch.manual_seed(1)
    return [torchvision.models.shufflenet_v2_x0_5(num_classes=4) for _ in range(2)]


def built(path, content):
    """The network of the weights in a file."""
    torch.save(content, path)
    return build_foreign(NAMED, 3, 4, 0.0, 1.0, weights=str(path))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own in the working folder."""
    (tmp_path / "my_networks.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_networks", None)


def test_a_network_by_import_path_is_finetuned(run, bars, mine):
    few = ["--data", bars, "--device", "cpu", "--batch-size", "16", "--epochs", "1"]
    arrest = ["--layers", "model.0", "--eps", "0.1", "--steps", "1", "--out", mine / "arrest"]
    code, printed = run("train", "arrest", "--classifier", "my_networks:trained", *arrest, *few)
    trained, start = load_classifier(mine / "arrest"), ForeignClassifier("my_networks:trained", 1, 2)
    assert code == 0 and trained.spec == start.spec, printed
    assert weights_fingerprint(trained) != weights_fingerprint(start)


def test_weights_for_a_function_run_with_a_given_normalization(mine):
    network = ForeignClassifier("my_networks:trained", 1, 2).model
    torch.save({"net": prefixed(network.state_dict(), "module.")}, mine / "w.pth")
    x = torch.rand(2, 1, 8, 8)
    for mean, std in ((0.0, 1.0), (0.3, 0.2)):
        made = build_foreign("my_networks:trained", 1, 2, mean, std, weights="w.pth")
        assert torch.equal(made(x), network((x - mean) / std))


def test_a_saved_classifier_runs_no_file_by_its_path(mine):
    (mine / "hidden.py").write_text("raise SystemError('this file was run')\n")
    made = ForeignClassifier("my_networks:trained", 1, 2)
    made.arguments["spec"] = f"{mine}/hidden.py:make"
    save_classifier(made, mine / "saved")
    with pytest.raises(ValueError, match=r"spec must be .* hidden:make .*hidden\.py:make'"):
        load_classifier(mine / "saved")


def test_given_weights(tmp_path):
    network, path = networks()[0], str(tmp_path / "weights.safetensors")
    save_file(network.state_dict(), path)
    made = build_foreign(NAMED, 3, 4, (0.5,) * 3, (0.25,) * 3, weights=path)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(made.eval()(x), network.eval()((x - 0.5) / 0.25))
    save_classifier(made, tmp_path / "saved")
    assert torch.equal(load_classifier(tmp_path / "saved")(x), made(x))
    with pytest.raises(ValueError, match=r"weights.* fc.bias is \[4\], must be \[5\]"):
        build_foreign(NAMED, 3, 5, (0.5,) * 3, (0.5,) * 3, weights=path)


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def without_counts(state):
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


#: Files of which the average, or else the only weights, must be taken: functions of the weights and of other weights.
FILES = {
    "timm": lambda s, o: {"state_dict": o, "state_dict_ema": s, "args": argparse.Namespace(lr=0.1), "epoch": 3},
    "DeiT": lambda s, o: {"model": o, "model_ema": s},
    "ema": lambda s, o: {"model": o, "ema": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}},
    "nested": lambda s, o: {"state_dict": {"net": o, "ema_net": prefixed(s, "module.")}},
    "no average": lambda s, o: {"state_dict": s, "state_dict_ema": None},
    "net": lambda s, o: {"net": prefixed(s, "module."), "acc": 90.0},
    "compiled": lambda s, o: prefixed(s, "_orig_mod.module."),
    "Lightning": lambda s, o: {"state_dict": prefixed(s, "model."), "hyper_parameters": {"lr": 0.1}},
    "compiled in Lightning": lambda s, o: {"state_dict": prefixed(s, "net._orig_mod.")},
    "average beside": lambda s, o: prefixed(o, "model.") | prefixed(s, "model_ema."),
    "in Sequential": lambda s, o: prefixed(without_counts(s), "1."),
    "AveragedModel": lambda s, o: {"swa_state_dict": prefixed(s, "module.") | {"n_averaged": torch.ones(1)}, "net": o},
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_other_programs(tmp_path, kind):
    network, other = networks()
    made = built(tmp_path / "weights.pth.tar", FILES[kind](network.state_dict(), other.state_dict()))
    assert weights_fingerprint(made.model) == weights_fingerprint(network)


def test_an_average_without_names_is_that_of_the_trained_parameters(tmp_path):
    network, other = networks()
    averages = {"shadow_params": [parameter.detach() for parameter in network.parameters()], "decay": 0.9}
    content = {"model": other.state_dict(), "ema": averages}
    assert torch.equal(built(tmp_path / "w.pth", content).model.fc.weight, network.fc.weight)
    averages["shadow_params"].pop()
    with pytest.raises(ValueError, match=r"moving average .* trained parameters; it has \d+ tensors"):
        built(tmp_path / "w.pth", content)


def test_the_error_names_what_is_missing_and_what_is_there(tmp_path):
    state = networks()[0].state_dict()
    resnet, many = torchvision.models.resnet18(num_classes=4), torchvision.models.shufflenet_v2_x0_5()
    for content, message in (
        ({"0.mean": torch.zeros(3)} | prefixed(state, "1."), r"0\.mean is unknown$"),
        (resnet.state_dict(), r"conv1\.0\.weight is missing; .*bn1\.bias is unknown"),
        ({"student": state, "teacher": state}, r"no state dict, .*it has 'student', 'teacher'"),
        (many.state_dict(), r"4 classes \(--num-classes\): fc\.bias is \[1000\], .*\[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            built(tmp_path / "w.pth", content)


def test_weights_of_a_file_run_with_the_normalization_of_their_training(run, bars, tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=2).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    given = ["--classifier", NAMED, "--classifier-weights", tmp_path / "w.pth"]
    carso = ["--layers", "model.stage2", "--cond-dim", "4", "--latent-dim", "2", "--decoder-width", "2", "--steps", "1"]
    few = ["--data", bars, "--device", "cpu", "--epochs", "1", "--batch-size", "16", "--kl-delay", "0"]
    few += ["--samples", "2"]
    x = torch.rand(4, 1, 16, 16).expand(-1, 3, -1, -1)
    normalization = ["--mean", "0.5", "0.4", "0.3", "--std", "0.25"]
    code, printed = run("train", "carso", *given, *normalization, *carso, *few, "--out", tmp_path / "out")
    told = "normalization of images in [0, 1]: mean 0.5 0.4 0.3, std 0.25 its accuracy without an attack: "
    assert code == 0 and told in printed and "of 8 held-out images" in printed
    with torch.no_grad():
        images = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.25
        assert torch.equal(load_classifier(tmp_path / "out/classifier")(x[:, :1]), network(images))
    for words, message in (
        (["--mean", "123.7"], "each of mean must be in [0, 1], got 123.7"),
        (["--std", "0"], "std must be above 0, got [0.0]"),
        (["--mean", "0.5", "0.5"], "mean needs 1 or 3 numbers, got 2"),
    ):
        code, printed = run("train", "carso", *given, *words, "--data", bars, "--device", "cpu")
        assert code == 2 and message in printed, printed


def test_grey_images_are_given_three_times():
    made, x = ForeignClassifier(NAMED, 1, 3, 0.3, 0.2).eval(), torch.rand(2, 1, 16, 16)
    assert torch.equal(made(x), made.model(((x - 0.3) / 0.2).repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match=r"images must have 1 or 3 channels for .*, got 2"):
        ForeignClassifier(NAMED, 2, 3)


class Executed:
    def __reduce__(self):
        return print, ("executed",)


def test_only_tensors_are_read(tmp_path, capsys):
    torch.save({"weight": Executed()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth has no weights"):
        read_weights(tmp_path / "bad.pth")
    assert "executed" not in capsys.readouterr().out
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth has no state dict"):
        read_weights(tmp_path / "list.pth")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_a_network_of_timm(tmp_path):
    made = ForeignClassifier("timm:resnet18", 1, 4, 0.3, 0.2).eval()
    save_classifier(made, tmp_path)
    x = torch.rand(2, 1, 32, 32)
    assert made(x).shape == (2, 4) and torch.equal(load_classifier(tmp_path)(x), made(x))
