"""Unusable input is refused in one line that says what is meant."""

import numpy as np
import pytest
import torch
from safetensors.torch import save

import purify_fast
from purify_fast._settings import weights_fingerprint
from purify_fast.models.classifiers import SmallCNN, build_classifier
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
    "train classifier --data {bars} --epochs 0": "--epochs must be at least 1, got 0",
    "train classifier --data {bars} --device gpu": "--device gpu cannot be used here: give auto, cpu, cuda or cuda:N",
    "train classifier --data {bars} --size 0": "--size must be (H, W), both at least 1, got (0, 0)",
    "train classifier --data {bars} --model resnet18": "--model must be small_cnn, preact_resnet18, wide_resnet, "
    "torchvision:NAME such as torchvision:resnet18, timm:NAME or",
    "train diffusion --epochs 1": "train diffusion is no command: examples/your_diffusion_loop.py --train OUT trains a "
    "denoiser, and `purify-fast evaluate OUT --classifier FOLDER` puts it in front of a classifier",
    "train classifier --eps 8/0": "must be a number or a fraction such as 8/255, got '8/0'",
    "train carso --data {bars} --classifier nowhere": "nowhere is not a saved model: it does not exist",
    "train carso --recipe cifar": "--recipe must be one of cifar10, cifar100, tiny_imagenet",
    "train carso --recipe cifar10 --init x": "--init has no effect beside --recipe",
    "train carso --official-code": "--official-code has no effect without --recipe",
    "train atop --data {bars} --classifier {fits}": "runs/generator is missing: run `purify-fast train generator`",
    "train arrest --mean 0.5": "--mean has no effect without --classifier-weights",
    f"{ARREST}--layers hiden": "no module 'hiden', its modules are ",
    f"{TRAIN.format('generator')}--classifier {{fits}} --purifier gan": "invalid choice 'gan' for argument",
    f"{TRAIN.format('atop')}--classifier {{fits}} --init None --batch-size 33": "at most the number of images, 32",
    "evaluate nowhere": "nowhere does not exist: train a model into it, or give zoo:NAME",
    "evaluate runs/2024-01-01T10:00:00 --eps 0.1": "runs/2024-01-01T10:00:00 does not exist",
    "evaluate {saved} --data {bars} --device cpu --eps 0.1": " are 1x16x16, but the model in {saved} was",
    "evaluate zoo:digits-pgd-at --eps 8": "at most 1 for linf, in image units, got 8",
    "evaluate {fits} --data digits --device cpu --eps 0.1": "images have 10 classes, but the ",
    "train carso --classifier {fits} --data digits --device cpu": " has only 2",
    "train arrest --eps 80/10": "at most 1 for linf, in image units, got 8",
    "evaluate zoo:digits-pgd-at --claim 70%": "--claim must be a number or a fraction such as 8/255, got '70%'",
    "evaluate zoo:digits-pgd-at --out {bars}": "must be a folder, got {bars}: {bars} is a file",
    "evaluate zoo:digits-pgd-at --precision bfloat16": "--precision bfloat16 is only for defences",
    "train classifier --data {bars} --model torchvision:resnet18 --width 3": "not for --model torchvision:resnet18",
    "evaluate zoo:digits-pgd-at --images 0": "--images must be at least 1, got 0",
    "evaluate mine.py:make --t-star 0.1": "--solver are only for a saved defence, got mine.py:make",
    "evaluate missing.py:make --eps 0.1": "missing.py does not exist",
    "evaluate no_such_module:make --eps 0.1": "No module named 'no_such_module'",
    "evaluate mine.py": "mine.py: give also the function that returns the model, as mine.py:function",
    "--foo": "Unrecognized options: --foo",
    "train": "Expected one of {classifier, arrest, generator, atop, carso}",
    "train clasifier": "no command 'train clasifier': is train classifier meant?",
    "train --resume": "--resume needs a folder: purify-fast train --resume FOLDER",
    "train --resume nowhere": "but nowhere does not exist",
    "train --resume {saved}": "but {saved} holds a model",
    "train classifier --epohs 3": "Unrecognized options: --epohs, 3; is --epochs meant?",
    "train classifier --epochs x": "--epochs must be a whole number, got 'x'",
    "train classifier --eps": "Missing value for argument '--eps'",
    "train classifier --data nowhere": "nowhere",
    "train classifier --config nowhere.yaml": "nowhere.yaml",
    "train classifier --data {bars} --model torchvision:resnet8": "no model 'resnet8', the nearest are ",
    "train classifier --data {bars} --batch-size 0": "--batch-size must be at least 1, got 0",
    "train classifier --data {bars} --learning-rate -1": "--learning-rate must be",
    f"{TRAIN.format('carso')}--classifier {{fits}} --samples 0": "--samples must be at least 1, got 0",
    f"{TRAIN.format('carso')}--classifier {{fits}} --kl-delay 0.9 --epochs 1 --batch-size 16": "--kl-delay is too long",
    f"{TRAIN.format('generator')}--classifier {{fits}} --epochs 0": "--epochs must be at least 1, got 0",
    "evaluate --epss 3": "is --eps meant?",
    "evaluate zoo:digits-pgd": "the nearest are digits-pgd-at",
    "evaluate zoo:digits-pgd-at --protocol quick": "invalid choice 'quick' for argument '--protocol'",
    "evaluate zoo:digits-pgd-at --norm l2": "--norm l2 needs --eps too",
    "evaluate zoo:digits-pgd-at --claim 170": "--claim must be",
    "evaluate zoo:digits-pgd-at --minutes 0": "--minutes must be above 0",
    "evaluate zoo:digits-pgd-at --steps -1": "--steps must be at least 1, got -1",
    "evaluate zoo:digits-pgd-at --data nowhere": "nowhere",
    "evaluate zoo:digits-pgd-at --classifier {fits}": "are only for a saved defence, got zoo:digits-pgd-at",
    "evaluate {fits} --data {bars} --device cpu": "--eps must be given, such as --eps 8/255: {fits} has no run.yaml",
    "check": "REPORT must be given",
    "check nowhere": "nowhere contains no report.json: it does not exist",
    "check {fits}": "{fits} contains no report.json: it holds a model",
    "check nowhere --batch-size 0": "--batch-size must be at least 1, got 0",
    "certify zoo:digits-pgd-at": "--sigma must be given, such as --sigma 0.25",
    "certify zoo:digits-smoothed --sigma 64": "--sigma must be in (0, 4] in image units",
    "certify zoo:digits-smoothed --radius -1": "each of radius must be at least 0, got -1",
    "certify zoo:digits-smoothed --radius 5": "--draws must be more, or radius smaller",
    "certify zoo:digits-smoothed --attack fast": "--attack needs a --radius above 0",
    "certify zoo:digits-smoothed --alpha 2": "--alpha must be in (0, 1), got 2",
    "certify zoo:digits-smoothed --votes 5": "--votes has no effect without --attack",
    "certify zoo:digits-smoothed --start 900 --max 3": "must leave an image",
    "certify zoo:digits-smoothed --one-shot": "--one-shot needs a model with a method one_shot",
    "certify zoo:digits-smoothed --draws 0": "--draws must be at least 1, got 0",
    "recipe nothing": "nothing",
    "zoo nothing": "nothing",
    "zoo a b": "Unrecognized options: b",
    "info extra": "Unrecognized options: extra",
    "tune --ops nothing": "nothing",
    "tune --device gpu": "invalid choice 'gpu' for argument '--device'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_input_that_cannot_be_used_is_one_line_and_exit_2(run, bars, saved, fits, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    code, printed = run(*line.format(bars=bars, saved=saved, fits=fits).split())
    wanted = REFUSED[line].replace("{saved}", str(saved)).replace("{bars}", str(bars)).replace("{fits}", str(fits))
    assert code == 2 and wanted in printed and "Traceback" not in printed, printed
    assert not (tmp_path / "runs").exists()


def test_a_network_of_any_size_is_judged_at_the_size_of_its_training(run, bars, tmp_path):
    save_classifier(build_classifier("preact_resnet18", (1, 16, 16), 2, width=2), tmp_path / "net")
    (tmp_path / "net" / "run.yaml").write_text("command: train classifier\nsize: [16]\neps: 0.1\n")
    code, printed = run("evaluate", tmp_path / "net", "--data", bars, "--size", "8", "--device", "cpu")
    assert code == 2 and f"are 1x8x8, but the model in {tmp_path / 'net'} was trained on 1x16x16" in printed, printed


def test_a_function_that_takes_images_is_no_function_that_returns_a_model(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def direct(x):\n    return x\n")
    code, printed = run("evaluate", "mine.py:direct", "--eps", "0.1", "--device", "cpu")
    assert code == 2 and "mine.py:direct must take no arguments and return the model" in printed, printed


NEWER_FILES = [("SmallCNN", "holds a model that cannot be loaded{}: "), ("NewKind", "holds a 'NewKind'{}, not")]


@pytest.mark.parametrize(("kind", "message"), NEWER_FILES)
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


DAMAGED = [b"", b"{}", b"\xff\xfe\x00", save({}, {"purify_fast": "0 {}"}), {"colour": 3}, {"width": 5}]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_model_file_and_arguments_that_no_model_takes(run, bars, saved, content):
    if isinstance(content, dict):
        facts, state = read_model(saved)
        save_model(saved, facts["kind"], facts["arguments"] | content, state)
    else:
        (saved / "model.safetensors").write_bytes(content)
    code, printed = run("evaluate", saved, "--data", bars, "--device", "cpu", "--eps", "0.1")
    assert code == 2 and f"{saved} holds a model that cannot be loaded" in printed and "Traceback" not in printed
