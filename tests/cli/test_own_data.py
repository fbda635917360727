"""Each method's command on data of a user's own, by the method's recipe: killed, resumed, saved and loaded."""

import signal

import numpy as np
import pytest
import torch
from forks import kill_at_call, together

import purify_fast
from purify_fast import cli
from purify_fast.training import load_classifier, loop
from purify_fast.training.run import CHECKPOINT, read_tree

#: Options that make the networks and the attacks small. A delayed term of the loss acts from the first step. AToP's
#: recipe resizes images to 256 x 256 by default.
SMALL = {
    "carso": "--recipe cifar10 --layers conv2 hidden --cond-dim 8 --latent-dim 4 --samples 2 --steps 1 --alpha None "
    "--kl-delay 0",
    "atop": "--recipe cifar_rt2 --width 4 --discriminator-width 4 --cls-delay 0 --size 16 24",
    "arrest": "--recipe resnet18 --steps 1 --alpha None",
}
#: The optimizer of CARSO's recipe moves the weights that are saved only at every sixth step.
LENGTH = "--batch-size 8 --epochs 2 --steps-per-epoch 3 --checkpoint-seconds 0"


def train(method, place, out, options):
    words = f"train {method} {options} --data {place}/own.npz --device cpu --out {out}"
    return cli.main(words.split())


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with images that are not square, and a classifier that was trained on them."""
    place = tmp_path_factory.mktemp("own")
    x, y = np.random.RandomState(0).randint(0, 256, (24, 16, 24)).astype(np.uint8), np.arange(24) % 3
    np.savez(place / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    options = "--model small_cnn --width 4 --epochs 1 --batch-size 8"
    assert train("classifier", place, place / "classifier", options) == 0
    return place


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if name != "arrest" else ()) for name in SMALL]
)
def test_each_method_on_own_data_is_killed_and_resumed(own, method, tmp_path):
    def trained(name):
        return train(method, own, tmp_path / name, f"{SMALL[method]} {LENGTH} --classifier {own}/classifier")

    ended = together(tmp_path, 1, lambda: kill_at_call(loop, "train_step", 4) or trained("resumed"), None)
    assert ended.codes == [-signal.SIGKILL], ended.errors
    assert read_tree(tmp_path / "resumed" / CHECKPOINT)["step"] == 3
    assert trained("resumed") == trained("whole") == 0
    load = load_classifier if method == "arrest" else purify_fast.load_defence
    one, other = (load(tmp_path / name).eval() for name in ("resumed", "whole"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert one(torch.rand(2, 1, 16, 24)).shape == (2, 3)
