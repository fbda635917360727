"""Each method on data of a user's own, by a recipe if there is one: killed, resumed, saved and loaded."""

import os
import signal

import numpy as np
import own_loader
import pytest
import torch
from forks import together
from pictures import picture

import purify_fast
from purify_fast import cli
from purify_fast.training import load_classifier, loop
from purify_fast.training.checkpoint import CHECKPOINT, read_tree

#: Options that make the networks and the attacks small.
SMALL = {
    "carso": "--recipe cifar10 --layers conv2 hidden --cond-dim 8 --latent-dim 4 --samples 2 --steps 1 --alpha None",
    "atop": "--recipe cifar_rt2 --width 4 --discriminator-width 4",
    "arrest": "--recipe resnet18 --steps 1 --alpha None",
}
#: A delayed term of the loss acts from the first step.
AT_ONCE = {"carso": ["--kl-delay", "0"], "atop": ["--cls-delay", "0"]}


def folder(root, classes, side):
    for part, images in (("train", 24), ("val", 2 * classes)):
        for number in range(images):
            picture(root / part / f"class{number % classes}" / f"{number}.png", number, (side, side))
    return root


def npz(path):
    x, y = np.random.RandomState(0).randint(0, 256, (24, 16, 24)).astype(np.uint8), np.arange(24) % 3
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return path


class Own:
    """A data set, and a classifier that was trained on it; makes the words of commands."""

    def __init__(self, path, shape, classes, base, model="small_cnn"):
        self.path, self.shape, self.classes, self.base = path, shape, classes, str(base)
        # AToP's recipe resizes images to 256 x 256 by default
        self.size = {"atop": ["--size", str(shape[1]), str(shape[2])]}
        words = ["train", "classifier", "--model", model, "--width", "4", "--epochs", "1", "--out", self.base]
        assert cli.main([*words, *self.common, "--batch-size", "8"]) == 0

    @property
    def common(self):
        return ["--data", str(self.path), "--device", "cpu"]

    def train(self, method, out):
        # The optimizer of CARSO's recipe moves the weights that are saved only at every sixth step.
        length = ["--batch-size", "8", "--epochs", "2", "--steps-per-epoch", "3", "--checkpoint-seconds", "0"]
        words = [*SMALL[method].split(), *AT_ONCE.get(method, []), *length, *self.size.get(method, [])]
        return cli.main(["train", method, *words, *self.common, "--classifier", self.base, "--out", str(out)])


class Loaded(Own):
    """The same folder, read by a DataLoader of the user's script, which `fit` gets in place of images."""

    def train(self, method, out):
        own_loader.train(method, self.path, self.base, out, self.shape[1])
        return 0


@pytest.fixture(scope="module", params=["npz", pytest.param("loader", marks=pytest.mark.slow)])
def own(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("own")
    if request.param == "npz":
        return Own(npz(place / "own.npz"), (1, 16, 24), 3, place / "classifier")
    images = folder(place / "own", 3, 24)
    return Loaded(images, (3, 24, 24), 3, place / "classifier", "preact_resnet18")


def killed(own, method, out):
    """Train until the process is killed before its fourth step."""
    step, taken = loop.train_step, []

    def killing(*given):
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        taken.append(1)
        return step(*given)

    loop.train_step = killing
    own.train(method, out)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if name != "arrest" else ()) for name in SMALL]
)
def test_each_method_on_own_data_is_killed_and_resumed(own, method, tmp_path):
    ended = together(tmp_path, 1, lambda: killed(own, method, tmp_path / "resumed"), None)
    assert ended.codes == [-signal.SIGKILL], ended.errors
    assert read_tree(tmp_path / "resumed" / CHECKPOINT)["step"] == (2 if isinstance(own, Loaded) else 3)
    assert own.train(method, tmp_path / "resumed") == 0
    assert own.train(method, tmp_path / "whole") == 0
    one, other = (loaded(own, tmp_path / name, method) for name in ("resumed", "whole"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert one(torch.rand(2, *own.shape)).shape == (2, own.classes)


def loaded(own, folder, method):
    if method == "arrest":
        return load_classifier(folder).eval()
    return purify_fast.load_defence(folder)
