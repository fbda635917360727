"""Unusable input is refused in one line that says what is meant."""

import numpy as np
import pytest
import torch
from safetensors.torch import save

import purify_fast
from purify_fast._settings import weights_fingerprint
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import load_classifier, run as checkpoint, save_classifier
from purify_fast.training.classifier import written_by
from purify_fast.training.run import read_model, save_model


@pytest.fixture
def saved(tmp_path):
    """A folder with a classifier of 28 x 28 images."""
    torch.manual_seed(0)
    save_classifier(SmallCNN(1, 2, (28, 28), width=2), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """A folder with a classifier of the data set's images."""
    folder = tmp_path_factory.mktemp("fits")
    save_classifier(SmallCNN(1, 2, width=2), folder)
    return folder


TRAIN = "train {} --data {{bars}} --device cpu "
ARREST = TRAIN.format("arrest") + "--classifier {fits} "
#: A command line, and what its refusal says. {bars} is a data set, {fits} a classifier of its images, {saved} one of
#: images of another size.
REFUSED = {
    "train classifier --data {bars} --epochs 0": "epochs must be at least 1, got 0",
    "train classifier --data {bars} --device gpu": "--device gpu cannot be used here: give auto, cpu, cuda or cuda:N",
    "train classifier --data {bars} --size 0": "image_size must be (H, W), both at least 1, got (0, 0)",
    "train classifier --data {bars} --model resnet18": "--model must be small_cnn, preact_resnet18, wide_resnet, "
    "fully_connected, torchvision:NAME such as torchvision:resnet18, timm:NAME or",
    "train diffusion --epochs 1": "train diffusion is no command: examples/your_diffusion_loop.py --train OUT trains a "
    "denoiser, and `purify-fast evaluate OUT --classifier FOLDER` puts it in front of a classifier",
    "train classifier --eps 8/0": "must be a number or a fraction such as 8/255, got '8/0'",
    "train carso --data {bars} --classifier nowhere": "nowhere is not a saved model",
    "train carso --recipe cifar": "recipe must be one of cifar10, cifar100, tiny_imagenet, mnist_v1",
    "train carso --recipe cifar10 --init x": "--init has no effect beside --recipe",
    "train carso --official-code": "--official-code has no effect without --recipe",
    "train carso --bank-refresh 0.5": "--bank-refresh has no effect without --bank",
    "train atop --data {bars} --classifier {fits}": "runs/generator is missing: run `purify-fast train generator`",
    "train arrest --mean 0.5": "--mean has no effect without --classifier-weights",
    f"{ARREST}--layers hiden": "no module 'hiden', its modules are ",
    f"{TRAIN.format('generator')}--classifier {{fits}} --purifier gan": "invalid choice 'gan' for argument",
    f"{TRAIN.format('atop')}--classifier {{fits}} --init None --batch-size 33": "at most the number of images, 32",
    "evaluate nowhere": "model.safetensors is missing",
    "evaluate runs/2024-01-01T10:00:00 --eps 0.1": "runs/2024-01-01T10:00:00 is not a saved model",
    "evaluate {saved} --data {bars} --device cpu --eps 0.1": " are 1x16x16, but the model in {saved} was",
    "evaluate zoo:digits-pgd-at --eps 8": "at most 1 for linf, in image units, got 8",
    "evaluate {fits} --data digits --device cpu --eps 0.1": "images have 10 classes, but the ",
    "train carso --classifier {fits} --data digits --device cpu": " has only 2",
    "train arrest --eps 80/10": "at most 1 for linf, in image units, got 8",
    "evaluate zoo:digits-pgd-at --claim 70%": "Error parsing --claim",
    "evaluate zoo:digits-pgd-at --out {bars}": "must be a folder, got {bars}: {bars} is a file",
    "evaluate zoo:digits-pgd-at --precision bfloat16": "--precision bfloat16 is only for defences",
    "train classifier --data {bars} --model torchvision:resnet18 --width 3": "not for --model torchvision:resnet18",
    "evaluate zoo:digits-pgd-at --images 0": "images must be at least 1, got 0",
    "evaluate mine.py:make --t-star 0.1": "--solver are only for a saved defence, got mine.py:make",
    "evaluate missing.py:make --eps 0.1": "missing.py does not exist",
    "evaluate no_such_module:make --eps 0.1": "No module named 'no_such_module'",
    "evaluate mine.py": "mine.py: give also the function that returns the model, as mine.py:function",
}


@pytest.mark.parametrize("line", REFUSED)
def test_input_that_cannot_be_used_is_one_line_and_exit_2(run, bars, saved, fits, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    code, printed = run(*line.format(bars=bars, saved=saved, fits=fits).split())
    assert code == 2 and REFUSED[line].format(saved=saved, bars=bars) in printed and "Traceback" not in printed, printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("SmallCNN", "holds a model that cannot be loaded{}: "), ("NewKind", "holds a 'NewKind'{}, not")],
)
def test_a_file_of_a_newer_version_names_both(run, bars, saved, tmp_path, monkeypatch, kind, message):
    state = load_classifier(saved)
    assert "purify_fast" not in written_by(read_model(saved)[0])
    monkeypatch.setattr(checkpoint, "__version__", "9.8.7")
    save_classifier(state, tmp_path / "new" / "classifier")
    mark = weights_fingerprint(load_classifier(tmp_path / "new" / "classifier"))
    save_model(tmp_path / "new", kind, {**state.arguments, "dropout": 0.1}, state.state_dict(), classifier=mark)
    monkeypatch.undo()
    code, printed = run("evaluate", tmp_path / "new", "--data", bars, "--device", "cpu", "--eps", "0.1")
    wrote = f" (purify_fast 9.8.7 wrote it, and this is purify_fast {purify_fast.__version__})"
    assert code == 2 and message.format(wrote) in printed and "Traceback" not in printed, printed


def test_a_class_without_images(run, tmp_path):
    x, y = np.zeros((8, 16, 16), np.uint8), np.array([0, 2] * 4)
    np.savez(tmp_path / "gap.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    words = ["--data", tmp_path / "gap.npz", "--device", "cpu", "--epochs", "1", "--batch-size", "8", "--width", "2"]
    code, printed = run("train", "classifier", *words, "--out", tmp_path / "out")
    assert code == 2 and "every label from 0 to the largest" in printed
    code, printed = run("train", "classifier", *words, "--out", tmp_path / "out", "--num-classes", "3")
    assert code == 0 and load_classifier(tmp_path / "out").arguments["num_classes"] == 3


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff\xfe\x00", save({}, {"purify_fast": "0 {}"}), {"colour": 3}, {"width": 5}]
)
def test_a_damaged_model_file_and_arguments_that_no_model_takes(run, bars, saved, content):
    if isinstance(content, dict):
        facts, state = read_model(saved)
        save_model(saved, facts["kind"], facts["arguments"] | content, state)
    else:
        (saved / "model.safetensors").write_bytes(content)
    code, printed = run("evaluate", saved, "--data", bars, "--device", "cpu", "--eps", "0.1")
    assert code == 2 and f"{saved} holds a model that cannot be loaded" in printed and "Traceback" not in printed
